// The judge of connections: the rules of the API's documentation, one by one.
import { describe, expect, test } from "vitest";
import { type Connection, type End, type PodEnd, Policies } from "./policies.ts";

const pod = (name: string, namespace = "a", labels: Record<string, string> = { app: name }): PodEnd => ({
  kind: "pod",
  name,
  namespace,
  labels,
  ip: "10.1.0.7",
  ports: { http: 8080 },
});
const policy = (spec: Record<string, unknown>, namespace = "a") => ({
  apiVersion: "networking.k8s.io/v1",
  kind: "NetworkPolicy",
  metadata: { name: "p", namespace },
  spec,
});
const labelled = (app: string) => ({ matchLabels: { app } });
const goes = (
  policies: readonly unknown[],
  from: End,
  to: End,
  more: Partial<Connection> & { namespaces?: Record<string, Record<string, string>> } = {},
) => new Policies(policies, more.namespaces).judge({ from, to, port: 80, ...more }).isAllowed;
const one = pod("one");
const two = pod("two");

describe("NetworkPolicies", () => {
  test("a pod that no policy selects takes and sends everything", () => {
    expect(goes([], one, two)).toBe(true);
    expect(goes([policy({ podSelector: labelled("three"), ingress: [] })], one, two)).toBe(true);
    expect(goes([policy({ podSelector: {}, ingress: [] }, "b")], one, two)).toBe(true);
  });

  test("a policy without rules closes its directions: ingress always, egress where it says so", () => {
    const closed = policy({ podSelector: {} });
    expect(goes([closed], one, two)).toBe(false);
    expect(goes([closed], one, { kind: "address", ip: "9.9.9.9" })).toBe(true);
    const both = policy({ podSelector: {}, policyTypes: ["Ingress", "Egress"] });
    expect(goes([both], one, { kind: "address", ip: "9.9.9.9" })).toBe(false);
    const sends = policy({ podSelector: labelled("one"), policyTypes: ["Egress"] });
    expect(goes([sends], two, one)).toBe(true);
    expect(goes([sends], one, two)).toBe(false);
    expect(new Policies([sends]).isIsolated(one, "Ingress")).toBe(false);
    expect(new Policies([sends]).isIsolated(one, "Egress")).toBe(true);
  });

  test("both ends must agree, and policies add up", () => {
    const out = policy({
      podSelector: labelled("one"),
      policyTypes: ["Egress"],
      egress: [{ to: [{ podSelector: {} }] }],
    });
    const closed = policy({ podSelector: labelled("two") });
    const open = policy({ podSelector: labelled("two"), ingress: [{ from: [{ podSelector: labelled("one") }] }] });
    expect(goes([out, closed], one, two)).toBe(false);
    expect(goes([out, closed, open], one, two)).toBe(true);
    expect(goes([out, closed, open], pod("three"), two)).toBe(false);
  });

  test("a pod selector alone means the policy's own namespace; with a namespace selector, that one's pods", () => {
    const own = policy({ podSelector: labelled("two"), ingress: [{ from: [{ podSelector: labelled("one") }] }] });
    expect(goes([own], pod("one", "b"), two)).toBe(false);
    const named = { matchLabels: { "kubernetes.io/metadata.name": "b" } };
    const peer = { namespaceSelector: named, podSelector: labelled("one") };
    const other = policy({ podSelector: labelled("two"), ingress: [{ from: [peer] }] });
    expect(goes([other], pod("one", "b"), two)).toBe(true);
    expect(goes([other], pod("four", "b"), two)).toBe(false);
    expect(goes([other], one, two)).toBe(false);
    const team = policy({
      podSelector: {},
      ingress: [{ from: [{ namespaceSelector: { matchLabels: { team: "x" } } }] }],
    });
    expect(goes([team], pod("any", "b"), two)).toBe(false);
    expect(goes([team], pod("any", "b"), two, { namespaces: { b: { team: "x" } } })).toBe(true);
  });

  test("expressions: In, NotIn, Exists, DoesNotExist", () => {
    const from = (operator: string, values?: string[]) =>
      policy({
        podSelector: labelled("two"),
        ingress: [
          { from: [{ podSelector: { matchExpressions: [{ key: "app", operator, ...(values ? { values } : {}) }] } }] },
        ],
      });
    const bare = pod("bare", "a", {});
    for (const [rule, named, without] of [
      [from("In", ["one"]), true, false],
      [from("NotIn", ["one"]), false, true],
      [from("Exists"), true, false],
      [from("DoesNotExist"), false, true],
    ] as const)
      expect([goes([rule], one, two), goes([rule], bare, two)]).toEqual([named, without]);
  });

  test("ports: number, range, name, protocol; no list means all", () => {
    const at = (...ports: unknown[]) => policy({ podSelector: labelled("two"), ingress: [{ ports }] });
    expect(goes([at({ port: 80 })], one, two)).toBe(true);
    expect(goes([at({ port: 81 })], one, two)).toBe(false);
    expect(goes([at({ port: 79, endPort: 81 })], one, two)).toBe(true);
    expect(goes([at({ port: 81, endPort: 90 })], one, two)).toBe(false);
    expect(goes([at({ port: "http" })], one, two, { port: 8080 })).toBe(true);
    expect(goes([at({ port: "http" })], one, two)).toBe(false);
    expect(goes([at({ port: 80, protocol: "UDP" })], one, two)).toBe(false);
    expect(goes([at({ protocol: "UDP" })], one, two, { protocol: "UDP", port: 9 })).toBe(true);
    expect(goes([at()], one, two)).toBe(true);
  });

  test("blocks match addresses, without what they except, in both families", () => {
    const block = (cidr: string, except: string[] = []) =>
      policy({
        podSelector: labelled("one"),
        policyTypes: ["Egress"],
        egress: [{ to: [{ ipBlock: { cidr, except } }] }],
      });
    const to = (ip: string): End => ({ kind: "address", ip });
    expect(goes([block("0.0.0.0/0", ["10.0.0.0/8"])], one, to("9.9.9.9"))).toBe(true);
    expect(goes([block("0.0.0.0/0", ["10.0.0.0/8"])], one, to("10.0.0.1"))).toBe(false);
    expect(goes([block("0.0.0.0/0", ["10.0.0.0/8"])], one, two)).toBe(false);
    expect(goes([block("10.1.0.0/16")], one, two)).toBe(true);
    expect(goes([block("0.0.0.0/0")], one, to("2001:db8::1"))).toBe(false);
    expect(goes([block("::/0", ["fc00::/7"])], one, to("2001:db8::1"))).toBe(true);
    expect(goes([block("::/0", ["fc00::/7"])], one, to("fd00::1"))).toBe(false);
  });

  test("a node reaches its pods; what is outside is judged by the pod's rules", () => {
    const closed = policy({ podSelector: {} });
    expect(goes([closed], { kind: "node", name: "n", ip: "10.0.0.2" }, two)).toBe(true);
    expect(goes([closed], { kind: "address", ip: "9.9.9.9" }, two)).toBe(false);
    expect(goes([policy({ podSelector: {}, ingress: [{}] })], { kind: "address", ip: "9.9.9.9" }, two)).toBe(true);
  });

  test("refusals name both ends and the policies that have no rule for it", () => {
    const policies = new Policies([policy({ podSelector: {} })]);
    const connections = [
      { from: one, to: two, port: 80 },
      { from: one, to: { kind: "address", ip: "9.9.9.9" }, port: 443 },
    ] as const;
    expect(policies.refused(connections)).toEqual(["a/one -> a/two:80: no ingress rule of a/p"]);
  });

  test("J1: a field that is not evaluated is an error", () => {
    expect(() => new Policies([policy({ podSelector: {}, ingress: [{ from: [{ fqdn: "x" }] }] })])).toThrow(/fqdn/);
    expect(() => new Policies([{ ...policy({ podSelector: {} }), kind: "CiliumNetworkPolicy" }])).toThrow(
      /NetworkPolicy/,
    );
  });
});
