// What gateways are told of a cluster: an entry for each replica of a ModelDeployment, in the words of control.proto. Pure; owns
// names, order and what a deployment without replicas looks like.
//
//   E1  each deployment has an entry: its groups, and one without a replica where no group stays; a group has one while it exists.
//   E2  the entries of one model come in the order of preference: the revision that is wanted first, what drains last.
//   E3  `deployment` names whom demand is told: nobody where a person has said that there shall be no replicas.
import { type ServedModel, ServedModel as ServedModelMessage } from "../../../proto/gen/muster/v1/control.ts";
import { type PhaseName, protoPhase } from "../../api/conditions.ts";
import type { GroupView, OwnerStatus } from "../../reconcile/deployment/world.ts";
import { type KubeObject, keyOf } from "../api/client.ts";
import { fieldsOf, millisOf } from "../api/fields.ts";
import { groupViewOf, statusOf, storedPlanOf } from "../owners/deployment-objects.ts";
import type { Store } from "../watch/store.ts";

export type ServedStores = { deployments: Store; plans: Store; groups: Store };

type PlanFields = Pick<
  ServedModel,
  "revision" | "contextTokens" | "family" | "vocabSize" | "hasChatTemplate" | "cut" | "world"
>;
type Naming = Pick<ServedModel, "name" | "aliases" | "namespace" | "deployment" | "createdUnixS">;
type Seen = { key: string; object: KubeObject | undefined; status: OwnerStatus; groups: GroupView[] };

export function servedModelsOf(stores: ServedStores): ServedModel[] {
  const seen = new Map<string, Seen>();
  for (const object of stores.deployments.all()) {
    const key = keyOf(object);
    seen.set(key, { key, object, status: statusOf("ModelDeployment", object.status), groups: [] });
  }
  for (const object of stores.groups.all()) {
    const read = groupViewOf(object);
    // One that cannot be read is its controller's to report; without a status it could not be asked anyway.
    if (read.kind === "refused" || read.value.spec.owner.kind !== "ModelDeployment") continue;
    const key = `${object.metadata.namespace ?? ""}/${read.value.spec.owner.name}`;
    const one = seen.get(key) ?? { key, object: undefined, status: {}, groups: [] };
    one.groups.push(read.value);
    seen.set(key, one);
  }
  return [...seen.values()].flatMap((one) => entriesOf(one, stores));
}

const isDraining = ({ spec, isLeaving }: GroupView): boolean => isLeaving || spec.state === "Draining";

function entriesOf({ key, object, status, groups }: Seen, { plans }: ServedStores): ServedModel[] {
  const [namespace = "", name = ""] = key.split("/");
  const isLeaving = object === undefined || object.metadata.deletionTimestamp !== undefined;
  const created = millisOf(object?.metadata.creationTimestamp) ?? 0;
  const naming: Naming = {
    name,
    aliases: [key],
    namespace,
    deployment: isLeaving || isSwitchedOff(object) ? "" : name,
    createdUnixS: BigInt(Math.floor(created / 1000)),
  };
  const place = (group: GroupView): number =>
    isDraining(group) ? 2 : group.spec.plan === status.planName || status.planName === undefined ? 0 : 1;
  const ordered = groups.toSorted((one, other) => place(one) - place(other) || one.spec.ordinal - other.spec.ordinal);
  const entries = ordered.map((group) => groupEntry(naming, group, planFields(plans, namespace, group.spec.plan)));
  const isWithout = !isLeaving && groups.every(isDraining);
  return isWithout ? [ownEntry(naming, status, planFields(plans, namespace, status.planName)), ...entries] : entries;
}

/** Zero replicas by a person's word; asleep by the autoscaler's is another thing. */
function isSwitchedOff(object: KubeObject | undefined): boolean {
  const { replicas, autoscale } = fieldsOf(object?.spec);
  return autoscale === undefined && replicas === 0;
}

function groupEntry(naming: Naming, group: GroupView, plan: PlanFields): ServedModel {
  const { status } = group;
  return ServedModelMessage.fromPartial({
    ...naming,
    ...plan,
    ...causeOf(status),
    replica: group.name,
    revision: plan.revision === "" ? (status.record?.revision ?? "") : plan.revision,
    numericsId: status.numericsId ?? "",
    incarnation: BigInt(status.incarnation ?? 0),
    leaderAddress: status.leader ?? "",
    readyRanks: status.readyRanks ?? 0,
    world: status.ranks ?? plan.world,
    restarts: status.restarts ?? 0,
    bytesLoaded: BigInt(status.bytesLoaded ?? 0),
    bytesTotal: BigInt(status.bytesTotal ?? 0),
    draining: isDraining(group),
  });
}

/** Of a deployment of which no group stays. */
function ownEntry(naming: Naming, status: OwnerStatus, plan: PlanFields): ServedModel {
  return ServedModelMessage.fromPartial({ ...naming, ...plan, ...causeOf(status) });
}

type Said = { phase?: PhaseName | undefined; cause?: { message: string; since: string } | undefined };

/** Nothing is said yet: whoever looks after it has not come by. */
function causeOf({ phase = "Scheduling", cause }: Said) {
  return {
    phase: protoPhase(phase),
    cause: cause?.message ?? "",
    sinceUnixMs: BigInt(Math.round(millisOf(cause?.since) ?? 0)),
  };
}

const NO_PLAN: PlanFields = {
  revision: "",
  contextTokens: 0,
  family: "",
  vocabSize: 0,
  hasChatTemplate: false,
  cut: undefined,
  world: 0,
};

function planFields(plans: Store, namespace: string, name: string | undefined): PlanFields {
  const object = name === undefined ? undefined : plans.get(`${namespace}/${name}`);
  const read = object && storedPlanOf(object);
  if (read?.kind !== "ok") return NO_PLAN;
  const { revision, contextTokens, model, cut } = read.value.spec;
  const { family, vocabSize, hasChatTemplate } = model;
  return { revision, contextTokens, family, vocabSize, hasChatTemplate, cut, world: cut.world };
}
