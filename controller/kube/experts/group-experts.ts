// Experts that move, for the groups of one term: which groups are handed to the mover, and what people are told of it. Owns the
// map that a ShardPlan shows in its status; when and what moves is expert-mover.ts and reconcile/expert-moves.ts.
//
//   X1  a group is handed over only while all workers of its incarnation serve, have addresses, and its owner wants it.
//   X2  each group has a map of its own, by its own load: one for all groups of a plan would have to be staged and switched by
//       all of them at one moment, and would be untrue while one restarts. An incarnation begins with the plan's own map,
//       whatever other groups have measured.
//   X3  status.expertMaps of a plan has an entry for each of its groups that was looked at, and none for one that has gone; of
//       more than EXPERT_MAPS_MAX those that changed last. What else the status says stays as it is, and where somebody has
//       written since, it is merged again.
import { createHash } from "node:crypto";
import { isDeepStrictEqual } from "node:util";
import { ExpertMap } from "../../../proto/gen/muster/v1/plan.ts";
import type { Trust } from "../../../proto/trust.ts";
import { parseReplicaGroup, parseShardPlan } from "../../api/parse.ts";
import { EXPERT_MAPS_MAX, type ExpertMapShown } from "../../api/shard-plan.ts";
import { type ExpertLimits, expertLimits } from "../../reconcile/expert-moves.ts";
import type { GroupStatus } from "../../reconcile/status.ts";
import type { Goal } from "../../reconcile/world.ts";
import { type KubeObject, keyOf } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { fieldsOf } from "../api/fields.ts";
import { shardPlans } from "../api/resources.ts";
import { gangPod } from "../gangs/gang-pods.ts";
import type { WorkerTemplate } from "../groups/pods.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";
import type { Lead } from "../run-controller.ts";
import { StatusWriter } from "../status/status-writer.ts";
import type { ReportsBoard } from "../workers/reports-board.ts";
import type { WorkerTarget } from "../workers/worker-link.ts";
import { targetOf } from "../workers/worker-sight.ts";
import { type ExpertLinks, GrpcExpertLinks } from "./expert-link.ts";
import { ExpertMover, type MapSeen, type MovableGroup, type Moved } from "./expert-mover.ts";

export type ExpertsOptions = {
  /** Between two looks at a group. Default: a minute. */
  lookMs?: number;
  /** What is worth a move. */
  limits?: Partial<ExpertLimits>;
  /** Default: gRPC. */
  links?: ExpertLinks;
};

export type GroupExpertsOptions = {
  lead: Lead;
  clock: Clock;
  random: () => number;
  template: WorkerTemplate;
  trust?: Trust | undefined;
  reports?: { board: ReportsBoard } | undefined;
  experts?: ExpertsOptions | undefined;
  metrics?: KubeMetrics | undefined;
  /** What workers say of themselves is new. */
  onMoved: (group: string) => void;
  onFailure?: ((group: string, detail: string) => void) | undefined;
};

/** What is known of a group; `status`: of its reconciler. */
export type ExpertsOf = { goal: Goal; status: GroupStatus; movesExperts: boolean };

/** The watch brings what the conflict was about, mostly before. */
const CONFLICT_WAIT_MS = 200;
const DIGEST_CHARS = 12;

export class GroupExperts {
  readonly #options: GroupExpertsOptions;
  readonly #mover: ExpertMover;
  readonly #writer: StatusWriter;
  /** By plan and the name of its group: what is to be shown, until it is written. */
  readonly #shown = new Map<string, Map<string, ExpertMapShown>>();
  /** Keys of the plans in which groups are shown. */
  readonly #planOf = new Map<string, string>();
  #imbalance: Moved["imbalance"] | undefined;
  #unmeter: (() => void)[] = [];

  constructor(options: GroupExpertsOptions) {
    const { lead, clock, random, trust, experts, reports } = options;
    this.#options = options;
    this.#mover = new ExpertMover({
      links: experts?.links ?? new GrpcExpertLinks(trust),
      clock,
      limits: { ...expertLimits, ...experts?.limits },
      ...(experts?.lookMs === undefined ? {} : { lookMs: experts.lookMs }),
      stepMsOf: (group) => reports?.board.stepTimeOf(group) ?? 0,
      onSeen: (group, seen) => this.#show(group, seen),
      onMoved: (group, moved) => this.#moved(group, moved),
      onFailure: (group, detail) => this.#failed(group, detail),
    });
    this.#writer = new StatusWriter({
      api: lead.api,
      resource: shardPlans,
      clock,
      random,
      headlineOf: (status) => JSON.stringify(fieldsOf(status).expertMaps ?? null),
      onWritten: (object) => this.#written(object),
      onConflict: (key) => void this.#againSoon(key),
      onRefused: (key, error) => {
        this.#shown.delete(key);
        options.onFailure?.(key, `the maps of its experts are refused: ${error.message}`);
      },
    });
    this.#meter();
  }

  /** Resolves when aborted. */
  run(signal: AbortSignal): Promise<void> {
    return this.#writer.run(signal);
  }

  look(group: KubeObject, seen: ExpertsOf): void {
    this.#mover.set(keyOf(group), this.#movable(group, seen));
  }

  /** The group has gone. */
  forget(key: string): void {
    this.#mover.set(key, undefined);
    const plan = this.#planOf.get(key);
    if (plan === undefined) return;
    this.#planOf.delete(key);
    this.#shownOf(plan).delete(nameOf(key));
    this.#offer(plan);
  }

  /** Resolves when nothing is under way any more. */
  async close(): Promise<void> {
    for (const stop of this.#unmeter.splice(0)) stop();
    await this.#mover.close();
  }

  /** X1. */
  #movable(group: KubeObject, { goal, status, movesExperts }: ExpertsOf): MovableGroup | undefined {
    if (!movesExperts || goal.kind !== "serve" || status.leaderAddress === "") return undefined;
    const { plan } = goal;
    const { incarnation } = status;
    if ((plan.cut?.ep ?? 1) < 2) return undefined;
    const { lead, template } = this.#options;
    const targets = lead.stores.pods.ownedBy(group.metadata.uid ?? "").flatMap((pod): WorkerTarget[] => {
      const gang = gangPod(pod);
      if (gang === undefined || gang.incarnation !== incarnation) return [];
      const name = { group: keyOf(group), incarnation, worker: gang.worker };
      const target = targetOf({ name, pod, port: template.port });
      return target === undefined ? [] : [target];
    });
    targets.sort((one, other) => one.name.worker - other.name.worker);
    const isWhole = targets.length === plan.workers && targets.every(({ name }, worker) => name.worker === worker);
    return isWhole ? { incarnation, plan, targets } : undefined;
  }

  // ---- what is said ----

  #moved(group: string, moved: Moved): void {
    const { lead, metrics, onMoved } = this.#options;
    const { map, text, imbalance } = moved;
    this.#imbalance = imbalance;
    metrics?.count("muster_expert_moves_total", { outcome: "moved" });
    this.#show(group, moved);
    const object = lead.stores.groups.get(group);
    const note = `map ${map.version}: ${text}`;
    if (object !== undefined)
      lead.events.record(object, { type: "Normal", reason: "ExpertsMoved", action: "MoveExperts", note });
    onMoved(group);
  }

  #failed(group: string, detail: string): void {
    const { lead, metrics, onFailure } = this.#options;
    metrics?.count("muster_expert_moves_total", { outcome: "failed" });
    onFailure?.(group, detail);
    const object = lead.stores.groups.get(group);
    if (object !== undefined)
      lead.events.record(object, { type: "Warning", reason: "ExpertsStay", action: "MoveExperts", note: detail });
  }

  #show(group: string, { map, incarnation }: MapSeen): void {
    const { lead, clock } = this.#options;
    const parsed = parseReplicaGroup(lead.stores.groups.get(group));
    if (parsed.kind === "refused") return;
    const key = `${parsed.value.metadata.namespace}/${parsed.value.spec.plan}`;
    const since = new Date(clock.nowMs()).toISOString();
    const shown = { incarnation: Number(incarnation), version: map.version, digest: digestOf(map), since };
    this.#planOf.set(group, key);
    this.#shownOf(key).set(nameOf(group), { group: nameOf(group), ...shown });
    this.#offer(key);
  }

  #shownOf(plan: string): Map<string, ExpertMapShown> {
    const shown = this.#shown.get(plan) ?? new Map<string, ExpertMapShown>();
    this.#shown.set(plan, shown);
    return shown;
  }

  /** X3. */
  #offer(key: string): void {
    const shown = this.#shown.get(key);
    const plan = this.#options.lead.stores.plans.get(key);
    if (shown === undefined) return;
    const parsed = parseShardPlan(plan);
    const before = parsed.kind === "ok" ? (parsed.value.status?.expertMaps ?? []) : [];
    const expertMaps = mergedMaps(before, shown, (group) => this.#follows(group, key));
    if (plan === undefined || parsed.kind === "refused" || isDeepStrictEqual(before, expertMaps)) {
      this.#shown.delete(key);
      this.#writer.forget(key);
    } else this.#writer.offer(plan, { ...fieldsOf(plan.status), expertMaps });
  }

  /** Whether there is a group of that name whose plan it is. */
  #follows(name: string, plan: string): boolean {
    const namespace = plan.slice(0, plan.indexOf("/"));
    const object = this.#options.lead.stores.groups.get(`${namespace}/${name}`);
    const group = parseReplicaGroup(object);
    const isLeaving = object?.metadata.deletionTimestamp !== undefined;
    return group.kind === "ok" && !isLeaving && `${namespace}/${group.value.spec.plan}` === plan;
  }

  #written(object: KubeObject): void {
    this.#options.lead.stores.plans.learn(object);
    this.#offer(keyOf(object));
  }

  async #againSoon(key: string): Promise<void> {
    const { clock, lead } = this.#options;
    await clock.sleep(lead.term.signal, clock.nowMs() + CONFLICT_WAIT_MS);
    if (!lead.term.signal.aborted) this.#offer(key);
  }

  #meter(): void {
    const { metrics } = this.#options;
    if (metrics === undefined) return;
    const read = (moment: "before" | "after") => () => this.#imbalance?.[moment] ?? 0;
    this.#unmeter = (["before", "after"] as const).map((moment) =>
      metrics.gauge("muster_expert_imbalance", { moment }, read(moment)),
    );
  }
}

const nameOf = (key: string): string => key.slice(key.indexOf("/") + 1);

/** X3; by name. What says the same as before is as old as before. */
export function mergedMaps(
  before: readonly ExpertMapShown[],
  shown: ReadonlyMap<string, ExpertMapShown>,
  follows: (group: string) => boolean,
): ExpertMapShown[] {
  const merged = new Map(before.map((entry) => [entry.group, entry]));
  for (const [group, entry] of shown) {
    const known = merged.get(group);
    if (!isDeepStrictEqual({ ...known, since: entry.since }, entry)) merged.set(group, entry);
  }
  return [...merged.values()]
    .filter(({ group }) => follows(group))
    .toSorted((one, other) => Date.parse(other.since) - Date.parse(one.since))
    .slice(0, EXPERT_MAPS_MAX)
    .toSorted((one, other) => (one.group < other.group ? -1 : 1));
}

/** As in the numerics id of those who use it: over slots and places, whatever the version. */
function digestOf(map: ExpertMap): string {
  const bytes = ExpertMap.encode({ ...map, version: 0 }).finish();
  return createHash("sha256").update(bytes).digest("hex").slice(0, DIGEST_CHARS);
}
