// Between objects of the API server and what is decided about owners of groups: reading them into views, and writing actions
// as objects. Owns labels, owner references and annotations of ShardPlans and ReplicaGroups; decides nothing.

import { draftPoolStatus } from "../../api/draft-pool.ts";
import { LABELS } from "../../api/meta.ts";
import { modelDeploymentStatus } from "../../api/model-deployment.ts";
import { parseDraftPool, parseModelDeployment, parseShardPlan } from "../../api/parse.ts";
import { drainAnnotations } from "../../reconcile/deployment/decide.ts";
import {
  DRAIN_UNTIL,
  type OwnerKind,
  QUESTION,
  wishOfDeployment,
  wishOfPool,
} from "../../reconcile/deployment/wish.ts";
import type {
  DeploymentAction,
  GroupView,
  Owner,
  OwnerStatus,
  PoolView,
  StoredPlan,
} from "../../reconcile/deployment/world.ts";
import { type JsonOperation, ownerReferenceTo, pointerSegment } from "../api/apply.ts";
import { apiVersionOf, type KubeObject, type Resource } from "../api/client.ts";
import { fieldsOf, millisOf, textOf } from "../api/fields.ts";
import { draftPools, modelDeployments, replicaGroups, shardPlans } from "../api/resources.ts";
import { parsedGroupOf } from "../groups/group-record.ts";

export const OWNERS: Readonly<Record<OwnerKind, Resource>> = {
  ModelDeployment: modelDeployments,
  DraftPool: draftPools,
};

function ownerKindOf(object: KubeObject): OwnerKind {
  return object.kind === "DraftPool" ? "DraftPool" : "ModelDeployment";
}

const owners = new WeakMap<KubeObject, Owner>();

/** Objects are never changed in place (A2), so what was read of one stays true. */
export function ownerOf(object: KubeObject): Owner {
  const known = owners.get(object) ?? readOwner(object);
  owners.set(object, known);
  return known;
}

function readOwner(object: KubeObject): Owner {
  const kind = ownerKindOf(object);
  const { name, generation = 0, deletionTimestamp } = object.metadata;
  const base = {
    kind,
    name,
    generation,
    isLeaving: deletionTimestamp !== undefined,
    status: statusOf(kind, object.status),
  };
  // A status that an other controller has broken is no reason to refuse the spec.
  const spec = { ...object, status: undefined };
  if (kind === "DraftPool") {
    const parsed = parseDraftPool(spec);
    return { ...base, wish: parsed.kind === "ok" ? { kind: "ok", value: wishOfPool(parsed.value) } : parsed };
  }
  const parsed = parseModelDeployment(spec);
  return { ...base, wish: parsed.kind === "ok" ? { kind: "ok", value: wishOfDeployment(parsed.value) } : parsed };
}

/** What cannot be read counts as not said. */
export function statusOf(kind: OwnerKind, status: unknown): OwnerStatus {
  const parsed = (kind === "DraftPool" ? draftPoolStatus : modelDeploymentStatus).safeParse(status ?? {});
  return parsed.success ? parsed.data : {};
}

type Read<T> = { kind: "ok"; value: T } | { kind: "refused"; title: string };

const groups = new WeakMap<KubeObject, Read<GroupView>>();

export function groupViewOf(object: KubeObject): Read<GroupView> {
  const known = groups.get(object) ?? readGroup(object);
  groups.set(object, known);
  return known;
}

function readGroup(object: KubeObject): Read<GroupView> {
  const { name, generation = 0, deletionTimestamp, creationTimestamp, annotations } = object.metadata;
  const parsed = parsedGroupOf(object);
  if (parsed.kind === "refused") return { kind: "refused", title: `ReplicaGroup ${name}: ${parsed.fault.field}` };
  return {
    kind: "ok",
    value: {
      name,
      spec: parsed.value.spec,
      status: parsed.value.status ?? {},
      createdMs: millisOf(creationTimestamp) ?? 0,
      generation,
      drainUntilMs: millisOf(annotations?.[DRAIN_UNTIL]),
      isLeaving: deletionTimestamp !== undefined,
    },
  };
}

const plans = new WeakMap<KubeObject, Read<StoredPlan>>();

export function storedPlanOf(object: KubeObject): Read<StoredPlan> {
  const known = plans.get(object) ?? readPlan(object);
  plans.set(object, known);
  return known;
}

function readPlan(object: KubeObject): Read<StoredPlan> {
  const { name, creationTimestamp, annotations } = object.metadata;
  const parsed = parseShardPlan(object);
  if (parsed.kind === "refused") return { kind: "refused", title: `ShardPlan ${name}: ${parsed.fault.field}` };
  return {
    kind: "ok",
    value: {
      name,
      question: annotations?.[QUESTION] ?? "",
      createdMs: millisOf(creationTimestamp) ?? 0,
      spec: parsed.value.spec,
      measured: parsed.value.status?.measured ?? {},
    },
  };
}

export function poolViewOf(object: KubeObject): PoolView {
  const owner = ownerOf(object);
  const vocabularies = owner.wish.kind === "ok" ? owner.wish.value.vocabularies : undefined;
  return {
    name: object.metadata.name,
    vocabulary: owner.status.vocabulary,
    vocabularies: vocabularies ?? [],
    ready: owner.status.readyReplicas ?? 0,
  };
}

/** Name of the DraftPool that a ModelDeployment asks for. */
export function poolNameOf(object: KubeObject): string | undefined {
  return textOf(fieldsOf(fieldsOf(object.spec).speculation).draftPool);
}

// ---- actions as objects ----

const labelOf = (kind: OwnerKind): string => (kind === "DraftPool" ? LABELS.pool : LABELS.deployment);

export function planObject(owner: KubeObject, action: Extract<DeploymentAction, { kind: "store-plan" }>): KubeObject {
  return {
    apiVersion: apiVersionOf(shardPlans),
    kind: shardPlans.kind,
    metadata: {
      ...ownedBy(owner, action.name),
      annotations: { [QUESTION]: action.question },
    },
    spec: action.spec,
  };
}

export function groupObject(owner: KubeObject, action: Extract<DeploymentAction, { kind: "apply-group" }>): KubeObject {
  const base = ownedBy(owner, action.name);
  const { annotations } = action;
  return {
    apiVersion: apiVersionOf(replicaGroups),
    kind: replicaGroups.kind,
    metadata: {
      ...base,
      labels: { ...base.labels, [LABELS.plan]: action.spec.plan },
      ...(Object.keys(annotations).length === 0 ? {} : { annotations }),
    },
    spec: action.spec,
  };
}

function ownedBy(owner: KubeObject, name: string) {
  const { namespace } = owner.metadata;
  return {
    name,
    ...(namespace === undefined ? {} : { namespace }),
    labels: { [labelOf(ownerKindOf(owner))]: owner.metadata.name },
    ownerReferences: [ownerReferenceTo(owner)],
  };
}

export function drainOperations(group: KubeObject, untilMs: number): JsonOperation[] {
  const marks = drainAnnotations(untilMs);
  const annotations: JsonOperation[] =
    group.metadata.annotations === undefined
      ? [{ op: "add", path: "/metadata/annotations", value: marks }]
      : Object.entries(marks).map(([key, value]) => ({
          op: "add",
          path: `/metadata/annotations/${pointerSegment(key)}`,
          value,
        }));
  return [...annotations, { op: "add", path: "/spec/state", value: "Draining" }];
}
