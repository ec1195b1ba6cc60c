// What the controller would do for an owner on a cluster as it was seen: the controller's own decisions (decideDeployment, the
// planner, the reservation ledger) applied to a copy of the cluster in memory. Owns the copy and how time passes in it.
//
//   W1  nothing is written to the server: the copy is read once, and everything happens in it.
//   W2  nothing is decided here. What is assumed is that all goes well: who has its places is bound and serves at once, what
//       drains has gone at once. So a rollout is shown at its end, and a wait only where it has none.
//   W3  the ledger's order holds for all groups of the cluster: those that wait there already get what they would get.
import { invalid } from "../../../proto/fault.ts";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import { editFault } from "../../api/parse.ts";
import type { ShardPlanSpec } from "../../api/shard-plan.ts";
import { calibrationFor } from "../../reconcile/deployment/calibration.ts";
import { decideDeployment } from "../../reconcile/deployment/decide.ts";
import type { Ask, Judged, Planning } from "../../reconcile/deployment/planning.ts";
import { choosePlan } from "../../reconcile/deployment/stored-plan.ts";
import type { OwnerWish } from "../../reconcile/deployment/wish.ts";
import type {
  Answer,
  DeploymentAction,
  DeploymentWorld,
  OwnerStatus,
  StoredPlan,
} from "../../reconcile/deployment/world.ts";
import { type KubeObject, keyOf } from "../api/client.ts";
import { groupObject, ownerOf, planObject, poolNameOf, poolViewOf } from "../owners/deployment-objects.ts";
import type { Placed, Stage, Unplaced } from "./what-if-stage.ts";

/** `onJudged` hears the cuts that were compared. */
export type Asker = (ask: Ask, onJudged: (model: ModelSpec, judged: Judged) => void) => Promise<Planning>;

export type Foreseen = {
  outcome: /** `fault` names the field. */
    | { kind: "refused"; fault: Fault }
    /** The source does not answer; the controller would ask again. */
    | { kind: "failed"; detail: string }
    | { kind: "infeasible"; reasons: readonly { code: string; text: string }[]; remedy: string | undefined }
    | {
        kind: "planned";
        planName: string;
        plan: ShardPlanSpec;
        /** It is there already: what is stored is not planned anew. */
        isStored: boolean;
        wanted: number;
        placed: readonly Placed[];
        waiting: readonly Unplaced[];
      };
  /** Undefined where nothing was planned: a stored plan has no table. */
  judged: ({ model: ModelSpec } & Judged) | undefined;
  /** `field: message`, as status would say them. */
  notices: readonly string[];
};

/** A rollout of a thousand replicas takes a few turns for each quarter of them. */
const ROUNDS_MAX = 1_000;

/**
 * Takes the owner up on the stage, new or changed, and lets the controller's decisions happen until none is left. The stage
 * keeps what came of it, for the next one. `object` has a namespace.
 */
export async function foresee(stage: Stage, object: KubeObject, ask: Asker): Promise<Foreseen> {
  const before = stage.ownerAt(object.kind, keyOf(object));
  const fault = refusedEdit(before, object);
  if (fault !== undefined) return { outcome: { kind: "refused", fault }, judged: undefined, notices: [] };
  const known = new Set(stage.plansOf(before).map(({ name }) => name));
  const rehearsal = new Rehearsal(stage, stage.takeUp(object), ask);
  const { wish } = ownerOf(rehearsal.owner);
  if (wish.kind === "refused") return { outcome: wish, judged: undefined, notices: [] };
  await rehearsal.run();
  return { outcome: rehearsal.outcome(wish.value, known), judged: rehearsal.judged, notices: rehearsal.notices };
}

function refusedEdit(before: KubeObject | undefined, next: KubeObject): Fault | undefined {
  if (before === undefined || (next.kind !== "ModelDeployment" && next.kind !== "DraftPool")) return undefined;
  return editFault(next.kind, before.spec, next.spec);
}

class Rehearsal {
  readonly #stage: Stage;
  readonly #ask: Asker;
  #owner: KubeObject;
  #answer: Answer | undefined;
  #status: OwnerStatus = {};
  judged: Foreseen["judged"];

  constructor(stage: Stage, owner: KubeObject, ask: Asker) {
    this.#stage = stage;
    this.#owner = owner;
    this.#ask = ask;
  }

  get owner(): KubeObject {
    return this.#owner;
  }

  get notices(): string[] {
    return (this.#status.notices ?? []).map(({ field, message }) => `${field}: ${message}`);
  }

  async run(): Promise<void> {
    for (let round = 0; round < ROUNDS_MAX; round++) {
      const world = this.#world();
      const decision = decideDeployment(world);
      this.#status = decision.status;
      this.#owner = this.#stage.takeUp({ ...this.#owner, status: decision.status });
      for (const action of decision.actions) this.#apply(action);
      const hasMoved = this.#stage.settle();
      if (decision.ask === "first" && this.#answer === undefined) await this.#plan(world);
      else if (decision.actions.length === 0 && !hasMoved) return;
    }
    throw new Error(`${keyOf(this.#owner)}: nothing has settled after ${ROUNDS_MAX} turns`);
  }

  outcome(wish: OwnerWish, known: ReadonlySet<string>): Foreseen["outcome"] {
    const world = this.#world();
    const chosen = choosePlan(world, wish);
    if (chosen.kind === "stored") return this.#planned(world, chosen.plan, known);
    const why = chosen.kind === "none" ? chosen.why : undefined;
    switch (why?.kind) {
      case "infeasible":
      case "refused":
      case "failed":
        return why;
      default:
        return { kind: "refused", fault: invalid("", this.#status.cause?.message ?? "nothing would be done") };
    }
  }

  #planned(world: DeploymentWorld, plan: StoredPlan, known: ReadonlySet<string>): Foreseen["outcome"] {
    const { placed, waiting } = this.#stage.placesOf(this.#owner);
    const decision = decideDeployment(world);
    const wanted = decision.status.targetReplicas ?? this.#wantedOf(world);
    const isStored = known.has(plan.name);
    return { kind: "planned", planName: plan.name, plan: plan.spec, isStored, wanted, placed, waiting };
  }

  #wantedOf({ owner }: DeploymentWorld): number {
    if (owner.wish.kind === "refused") return 0;
    const { scale } = owner.wish.value;
    return scale.kind === "fixed" ? scale.replicas : Math.max(1, scale.min);
  }

  #world(): DeploymentWorld {
    const owner = ownerOf(this.#owner);
    const wish = owner.wish.kind === "ok" ? owner.wish.value : undefined;
    const view = this.#stage.view();
    const { groups, unreadable } = this.#stage.groupsOf(this.#owner);
    return {
      nowMs: this.#stage.nowMs,
      owner,
      plans: this.#stage.plansOf(this.#owner),
      groups,
      unreadable,
      answer: this.#answer,
      better: undefined,
      leaving: view.leavingOf(groups.flatMap(({ status }) => (status.placement ?? []).map(({ node }) => node))),
      free: wish && view.freeFor(wish.question),
      load: [],
      scale: undefined,
      pool: this.#pool(),
      targets: [],
      needs: wish === undefined ? [] : view.needsOf(wish.question),
      image: "",
      told: undefined,
    };
  }

  #pool() {
    const name = poolNameOf(this.#owner);
    const object = this.#stage.ownerAt("DraftPool", `${this.#owner.metadata.namespace}/${name ?? ""}`);
    return name === undefined || object === undefined ? undefined : poolViewOf(object);
  }

  async #plan({ owner, plans, groups }: DeploymentWorld): Promise<void> {
    if (owner.wish.kind === "refused") return;
    const { question, planName } = owner.wish.value;
    const grounds = this.#stage.view().groundsFor(question);
    if (grounds === undefined) throw new Error("the copy of the cluster is not whole");
    const calibration = calibrationFor(planName, { plans, groups });
    const planning = await this.#ask({ question, grounds, calibration }, (model, judged) => {
      this.judged = { model, ...judged };
    });
    this.#answer = planning.kind === "failed" ? { ...planning, againMs: this.#stage.nowMs } : planning;
  }

  #apply(action: DeploymentAction): void {
    const { namespace } = this.#owner.metadata;
    switch (action.kind) {
      case "store-plan":
        this.#stage.add("plans", planObject(this.#owner, action));
        break;
      case "apply-group":
        this.#stage.add("groups", groupObject(this.#owner, action));
        break;
      case "drain-group":
      case "delete-group":
        this.#stage.remove("groups", `${namespace}/${action.name}`);
        break;
      case "delete-plan":
        this.#stage.remove("plans", `${namespace}/${action.name}`);
        break;
      default:
        throw new Error(`unreachable: action ${JSON.stringify(action satisfies never)}`);
    }
  }
}
