// Looks after each ReplicaGroup as its reconciler would, without workers: finds places on the nodes, loads, serves, drains.
import { parseReplicaGroup, parseShardPlan, type ReplicaGroup } from "../../../../controller/api/parse.ts";
import type { KubeObject, Resource } from "../../../../controller/kube/api/client.ts";
import { nodes, pods, replicaGroups, shardPlans } from "../../../../controller/kube/api/resources.ts";
import type { SimApiServer } from "../../../sim/api-server.ts";
import type { VirtualClock } from "../../../sim/virtual-clock.ts";

export type PlayerOptions = {
  server: SimApiServer;
  time: VirtualClock;
  random: () => number;
  onBroken: (text: string) => void;
};

const NS = "serving";
const { signal: never } = new AbortController();

export class GroupPlayer {
  readonly #options: PlayerOptions;
  readonly #pending = new Set<string>();

  constructor(options: PlayerOptions) {
    this.#options = options;
  }

  onChange(resource: Resource, after: KubeObject | undefined): void {
    if (resource.kind !== "ReplicaGroup" || after === undefined) return;
    this.#later(after.metadata.name, 100 + this.#options.random() * 1_900);
  }

  #of(resource: Resource, name: string): KubeObject | undefined {
    return this.#options.server.objects(resource).find(({ metadata }) => metadata.name === name);
  }

  #later(name: string, ms: number): void {
    if (this.#pending.has(name)) return;
    this.#pending.add(name);
    this.#options.time.at(this.#options.time.nowMs() + ms, () => {
      this.#pending.delete(name);
      void this.#step(name).catch((error: unknown) => this.#options.onBroken(`player: ${String(error)}`));
    });
  }

  async #step(name: string): Promise<void> {
    const object = this.#of(replicaGroups, name);
    const group = object === undefined ? undefined : groupIn(object);
    if (object === undefined || group === undefined) return;
    const { spec, status } = group;
    if (spec.state === "Draining") {
      if (status?.phase === "Stopped" && status.observedGeneration === group.metadata.generation) return;
      for (const pod of this.#options.server.objects(pods).filter(({ metadata }) => metadata.labels?.group === name)) {
        await this.#options.server.delete(pods, pod.metadata.name, NS, { gracePeriodSeconds: 0 }, never);
      }
      return this.#say(object, { phase: "Stopped", readyRanks: 0, ranks: 0 });
    }
    if (status?.phase === undefined || status.phase === "CapacityShort") return this.#place(object, group);
    if (status.phase === "Loading" || status.phase === "Degraded") {
      const ranks = 4;
      const rest = {
        placement: status.placement,
        readyRanks: ranks,
        ranks,
        tokensPerSecond: 100.5,
        leader: "10.0.0.1:7000",
      };
      return this.#say(object, { phase: "Serving", ...rest });
    }
  }

  async #place(object: KubeObject, group: ReplicaGroup): Promise<void> {
    const { name } = object.metadata;
    const plan = parseShardPlan(this.#of(shardPlans, group.spec.plan));
    if (plan.kind === "refused") return this.#later(name, 1_000);
    const { cut, workers } = plan.value.spec;
    const each = cut.world / workers;
    const open = this.#options.server.objects(nodes).filter(({ spec }) => Object(spec).unschedulable !== true);
    const free = open.map((node) => {
      const held = this.#options.server
        .objects(pods)
        .filter(({ spec }) => JSON.stringify(spec).includes(`"${node.metadata.name}"`));
      const gpus = held.reduce((sum, { metadata }) => sum + Number(metadata.labels?.gpus), 0);
      return { node: node.metadata.name, free: gpusOf(node) - gpus };
    });
    const chosen = free.filter((one) => one.free >= each).slice(0, workers);
    if (chosen.length < workers) {
      if (JSON.stringify(object.status ?? {}).includes("CapacityShort")) return this.#later(name, 1_000);
      await this.#say(object, { phase: "CapacityShort", readyRanks: 0, ranks: cut.world });
      return;
    }
    for (const [index, { node }] of chosen.entries())
      await this.#options.server.create(pods, podOf(object, index, node, each), never);
    const placement = chosen.map(({ node }, worker) => ({
      worker,
      node,
      pod: `${name}-1-${worker}`,
      firstRank: worker * each,
      ranks: each,
    }));
    await this.#say(object, { phase: "Loading", placement, readyRanks: 0, ranks: cut.world });
  }

  async #say(object: KubeObject, status: Record<string, unknown>): Promise<void> {
    const record = { incarnation: 1, revision: "r", begun: true, failures: [], restarts: 0 };
    const since = new Date(this.#options.time.nowMs()).toISOString();
    const cause = { code: String(status.phase).toLowerCase(), message: `${String(status.phase)} it is`, since };
    const whole = { ...status, cause, record, observedGeneration: object.metadata.generation };
    await this.#options.server.replaceStatus(
      replicaGroups,
      { ...object, status: JSON.parse(JSON.stringify(whole)) },
      never,
    );
  }
}

const gpusOf = ({ status }: KubeObject): number => Number(Object(status).allocatable?.["nvidia.com/gpu"] ?? 0);

function podOf(group: KubeObject, index: number, node: string, gpus: number): KubeObject {
  const { name, uid = "" } = group.metadata;
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name: `${name}-1-${index}`,
      namespace: NS,
      labels: { group: name, gpus: String(gpus) },
      ownerReferences: [{ apiVersion: group.apiVersion, kind: group.kind, name, uid }],
    },
    spec: { nodeName: node, containers: [{ name: "w", resources: { limits: { "nvidia.com/gpu": String(gpus) } } }] },
  };
}

function groupIn(object: KubeObject): ReplicaGroup {
  const parsed = parseReplicaGroup(object);
  if (parsed.kind === "refused") throw new Error(parsed.fault.detail);
  return parsed.value;
}
