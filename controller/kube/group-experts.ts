// Experts that move, for the groups of one term: which groups are handed to the mover, and what people are told of it. Owns the
// map that a ShardPlan shows in its status; when and what moves is expert-mover.ts and reconcile/expert-moves.ts.
//
//   X1  a group is handed over only while all workers of its incarnation serve, have addresses, and its owner wants it.
//   X2  status.expertMap of a plan is that of the group that was looked at last, each of which has its own; what else the
//       status says stays as it is, and where somebody has written since, it is merged again.
import { createHash } from "node:crypto";
import { ExpertMap } from "../../proto/gen/muster/v1/plan.ts";
import type { Trust } from "../../proto/trust.ts";
import { parseReplicaGroup, parseShardPlan } from "../api/parse.ts";
import type { ShardPlanStatus } from "../api/shard-plan.ts";
import { type ExpertLimits, expertLimits } from "../reconcile/expert-moves.ts";
import type { GroupStatus } from "../reconcile/status.ts";
import type { Goal } from "../reconcile/world.ts";
import { type KubeObject, keyOf } from "./client.ts";
import type { Clock } from "./clock.ts";
import { type ExpertLinks, GrpcExpertLinks } from "./expert-link.ts";
import { ExpertMover, type MovableGroup, type Moved } from "./expert-mover.ts";
import { fieldsOf } from "./fields.ts";
import { gangPod } from "./gang-pods.ts";
import type { KubeMetrics } from "./metrics.ts";
import type { WorkerTemplate } from "./pods.ts";
import type { ReportsBoard } from "./reports-board.ts";
import { shardPlans } from "./resources.ts";
import type { Lead } from "./run-controller.ts";
import { StatusWriter } from "./status-writer.ts";
import type { WorkerTarget } from "./worker-link.ts";
import { targetOf } from "./worker-sight.ts";

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

type Shown = NonNullable<ShardPlanStatus["expertMap"]>;

/** The watch brings what the conflict was about, mostly before. */
const CONFLICT_WAIT_MS = 200;
const DIGEST_CHARS = 12;

export class GroupExperts {
  readonly #options: GroupExpertsOptions;
  readonly #mover: ExpertMover;
  readonly #writer: StatusWriter;
  /** What plans are to show, by key, until it is written. */
  readonly #shown = new Map<string, Shown>();
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
      onSeen: (group, map) => this.#show(group, map),
      onMoved: (group, moved) => this.#moved(group, moved),
      onFailure: (group, detail) => this.#failed(group, detail),
    });
    this.#writer = new StatusWriter({
      api: lead.api,
      resource: shardPlans,
      clock,
      random,
      headlineOf: (status) => JSON.stringify(fieldsOf(status).expertMap ?? null),
      onWritten: (object) => this.#written(object),
      onConflict: (key) => void this.#againSoon(key),
      onRefused: (key, error) => {
        this.#shown.delete(key);
        options.onFailure?.(key, `its map of experts is refused: ${error.message}`);
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
    this.#show(group, map);
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

  #show(group: string, map: ExpertMap): void {
    const { lead, clock } = this.#options;
    const parsed = parseReplicaGroup(lead.stores.groups.get(group));
    if (parsed.kind === "refused") return;
    const key = `${parsed.value.metadata.namespace}/${parsed.value.spec.plan}`;
    this.#shown.set(key, { version: map.version, digest: digestOf(map), since: new Date(clock.nowMs()).toISOString() });
    this.#offer(key);
  }

  /** X2. */
  #offer(key: string): void {
    const expertMap = this.#shown.get(key);
    const plan = this.#options.lead.stores.plans.get(key);
    if (expertMap === undefined) return;
    const parsed = parseShardPlan(plan);
    if (plan === undefined || parsed.kind === "refused" || isSame(parsed.value.status?.expertMap, expertMap)) {
      this.#shown.delete(key);
      this.#writer.forget(key);
    } else this.#writer.offer(plan, { ...fieldsOf(plan.status), expertMap });
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

const isSame = (one: Shown | undefined, other: Shown): boolean =>
  one?.version === other.version && one.digest === other.digest;

/** As in the numerics id of those who use it: over slots and places, whatever the version. */
function digestOf(map: ExpertMap): string {
  const bytes = ExpertMap.encode({ ...map, version: 0 }).finish();
  return createHash("sha256").update(bytes).digest("hex").slice(0, DIGEST_CHARS);
}
