// Judges connections by NetworkPolicies, as the API's documentation says a network does. Pure. Owns the semantics of selectors,
// blocks, ports and policy types; what was connected, and which policies there are, is the caller's.
//
//   J1  a field that is not evaluated here is refused when policies are read, never taken for "matches".
//   J2  a connection is allowed iff its source may send and its destination may take it; answers need no rule.
//   J3  a node may always reach its own pods (probes), and what is outside of the cluster is under no policy.
import { BlockList, isIPv6 } from "node:net";
import { z } from "zod";

const Labels = z.record(z.string(), z.string());
export type Labels = z.infer<typeof Labels>;
const Selector = z.strictObject({
  matchLabels: Labels.default({}),
  matchExpressions: z
    .array(
      z.strictObject({
        key: z.string(),
        operator: z.enum(["In", "NotIn", "Exists", "DoesNotExist"]),
        values: z.array(z.string()).default([]),
      }),
    )
    .default([]),
});
type Selector = z.infer<typeof Selector>;
const Peer = z.strictObject({
  podSelector: Selector.optional(),
  namespaceSelector: Selector.optional(),
  ipBlock: z.strictObject({ cidr: z.string(), except: z.array(z.string()).default([]) }).optional(),
});
type Peer = z.infer<typeof Peer>;
const Port = z.strictObject({
  protocol: z.enum(["TCP", "UDP", "SCTP"]).default("TCP"),
  port: z.union([z.int(), z.string()]).optional(),
  endPort: z.int().optional(),
});
const Rule = z.strictObject({
  from: z.array(Peer).optional(),
  to: z.array(Peer).optional(),
  ports: z.array(Port).optional(),
});
type Rule = z.infer<typeof Rule>;
const Policy = z.object({
  kind: z.literal("NetworkPolicy"),
  metadata: z.looseObject({ name: z.string(), namespace: z.string() }),
  spec: z.strictObject({
    podSelector: Selector,
    policyTypes: z.array(z.enum(["Ingress", "Egress"])).optional(),
    ingress: z.array(Rule).optional(),
    egress: z.array(Rule).optional(),
  }),
});
type Policy = z.infer<typeof Policy>;

/** `ports`: those that its containers name. */
export type PodEnd = {
  kind: "pod";
  name: string;
  namespace: string;
  labels: Labels;
  ip: string;
  ports?: Readonly<Record<string, number>>;
};
const SeenPod = z.object({
  metadata: z.object({ name: z.string(), namespace: z.string(), labels: Labels.default({}) }),
  spec: z.object({
    containers: z.array(
      z.object({ ports: z.array(z.object({ name: z.string().optional(), containerPort: z.int() })).default([]) }),
    ),
  }),
  status: z.object({ podIP: z.string() }),
});

/** A Pod as the API has it. Throws where it has no address yet. */
export function podEndOf(pod: unknown): PodEnd {
  const { metadata, spec, status } = SeenPod.parse(pod);
  const named = spec.containers.flatMap(({ ports }) => ports);
  const ports = Object.fromEntries(named.flatMap(({ name, containerPort }) => (name ? [[name, containerPort]] : [])));
  return { kind: "pod", ...metadata, ip: status.podIP, ports };
}

/** A node of the cluster, or an address that is no pod's. */
export type End = PodEnd | { kind: "node"; name: string; ip: string } | { kind: "address"; ip: string };
/** `port`: at the destination, behind its Service. */
export type Connection = { from: End; to: End; port: number; protocol?: "TCP" | "UDP" | "SCTP" };
export type Verdict = { isAllowed: boolean; why: string };

export class Policies {
  readonly #policies: readonly Policy[];
  readonly #namespaces: Readonly<Record<string, Labels>>;

  /** `objects`: NetworkPolicies as the API has them. `namespaces`: labels by name. Throws where a policy is not understood. */
  constructor(objects: readonly unknown[], namespaces: Readonly<Record<string, Labels>> = {}) {
    this.#policies = objects.map((object) => Policy.parse(object));
    this.#namespaces = namespaces;
  }

  judge(connection: Connection): Verdict {
    const { from, to, port } = connection;
    const what = `${nameOf(from)} -> ${nameOf(to)}:${port}`;
    if (from.kind === "pod" && !this.#passes(from, "Egress", to, connection))
      return { isAllowed: false, why: `${what}: no egress rule of ${this.#namesOf(from, "Egress")}` };
    if (to.kind === "pod" && from.kind !== "node" && !this.#passes(to, "Ingress", from, connection))
      return { isAllowed: false, why: `${what}: no ingress rule of ${this.#namesOf(to, "Ingress")}` };
    return { isAllowed: true, why: what };
  }

  /** The connections that no policy allows, each with why; empty where all are allowed. */
  refused(connections: readonly Connection[]): string[] {
    return connections
      .map((connection) => this.judge(connection))
      .flatMap(({ isAllowed, why }) => (isAllowed ? [] : why));
  }

  /** Whether a pod has a policy of this direction at all: one without any takes and sends everything. */
  isIsolated(pod: PodEnd, type: "Ingress" | "Egress"): boolean {
    return this.#of(pod, type).length > 0;
  }

  #of(pod: PodEnd, type: "Ingress" | "Egress"): Policy[] {
    return this.#policies.filter(
      ({ metadata, spec }) =>
        metadata.namespace === pod.namespace && selects(spec.podSelector, pod.labels) && typesOf(spec).includes(type),
    );
  }

  #namesOf(pod: PodEnd, type: "Ingress" | "Egress"): string {
    return this.#of(pod, type)
      .map(({ metadata }) => `${metadata.namespace}/${metadata.name}`)
      .join(", ");
  }

  #passes(pod: PodEnd, type: "Ingress" | "Egress", other: End, connection: Connection): boolean {
    const policies = this.#of(pod, type);
    if (policies.length === 0) return true;
    return policies.some(({ metadata, spec }) =>
      (type === "Ingress" ? spec.ingress : spec.egress)?.some((rule) => {
        const peers = type === "Ingress" ? rule.from : rule.to;
        const isPeer = !peers?.length || peers.some((peer) => this.#isPeer(peer, other, metadata.namespace));
        return isPeer && hasPort(rule, connection);
      }),
    );
  }

  #isPeer({ podSelector, namespaceSelector, ipBlock }: Peer, end: End, home: string): boolean {
    if (ipBlock) return isInside(end.ip, ipBlock.cidr) && !ipBlock.except.some((cidr) => isInside(end.ip, cidr));
    if (end.kind !== "pod") return false;
    const labels = { "kubernetes.io/metadata.name": end.namespace, ...this.#namespaces[end.namespace] };
    const isPlace = namespaceSelector ? selects(namespaceSelector, labels) : end.namespace === home;
    return isPlace && (!podSelector || selects(podSelector, end.labels));
  }
}

/** As the API server fills it in: Ingress always, Egress where there are such rules. */
function typesOf({ policyTypes, egress }: Policy["spec"]): string[] {
  return policyTypes ?? (egress ? ["Ingress", "Egress"] : ["Ingress"]);
}

function selects({ matchLabels, matchExpressions }: Selector, labels: Labels): boolean {
  const isLabelled = Object.entries(matchLabels).every(([key, value]) => labels[key] === value);
  return (
    isLabelled &&
    matchExpressions.every(({ key, operator, values }) => {
      const value = labels[key];
      if (operator === "Exists") return value !== undefined;
      if (operator === "DoesNotExist") return value === undefined;
      const isIn = value !== undefined && values.includes(value);
      return operator === "In" ? isIn : !isIn;
    })
  );
}

function hasPort({ ports }: Rule, { to, port, protocol = "TCP" }: Connection): boolean {
  if (!ports?.length) return true;
  return ports.some((allowed) => {
    if (allowed.protocol !== protocol) return false;
    if (allowed.port === undefined) return true;
    if (typeof allowed.port === "string") return to.kind === "pod" && to.ports?.[allowed.port] === port;
    return port >= allowed.port && port <= (allowed.endPort ?? allowed.port);
  });
}

function isInside(ip: string, cidr: string): boolean {
  const [net = "", bits = ""] = cidr.split("/");
  const family = (address: string) => (isIPv6(address) ? "ipv6" : "ipv4");
  const block = new BlockList();
  block.addSubnet(net, Number(bits), family(net));
  return family(ip) === family(net) && block.check(ip, family(ip));
}

const nameOf = (end: End): string => {
  if (end.kind === "pod") return `${end.namespace}/${end.name}`;
  return end.kind === "node" ? `node ${end.name}` : end.ip;
};
