// The four CustomResourceDefinitions as data. Owns columns, short names and subresources; fields and rules are the kinds'.
import type { z } from "zod";
import { draftPoolSpec, draftPoolStatus } from "./draft-pool.ts";
import { GROUP, KINDS, type Kind, NAMES, VERSION } from "./meta.ts";
import { modelDeploymentSpec, modelDeploymentStatus } from "./model-deployment.ts";
import { ownerNameRule } from "./parse.ts";
import { replicaGroupSpec, replicaGroupStatus } from "./replica-group.ts";
import { VALIDATIONS } from "./rules.ts";
import { shardPlanSpec, shardPlanStatus } from "./shard-plan.ts";
import { type JsonSchema, toStructural } from "./structural.ts";

type Column = { name: string; type: "string" | "integer" | "number" | "date"; jsonPath: string; priority?: 1 };

type Definition = {
  spec: z.ZodType;
  status: z.ZodType;
  columns: readonly Column[];
  categories: readonly string[];
  isScaled: boolean;
  /** Users name it, and other names are made from that. */
  isOwner: boolean;
};

const age: Column = { name: "Age", type: "date", jsonPath: ".metadata.creationTimestamp" };
const causeColumns: readonly Column[] = [
  { name: "Cause", type: "string", jsonPath: ".status.cause.message", priority: 1 },
  { name: "Since", type: "date", jsonPath: ".status.cause.since", priority: 1 },
];

const DEFINITIONS: Readonly<Record<Kind, Definition>> = {
  ModelDeployment: {
    spec: modelDeploymentSpec,
    status: modelDeploymentStatus,
    columns: [
      { name: "Plan", type: "string", jsonPath: ".status.plan" },
      { name: "Ready", type: "string", jsonPath: ".status.ready" },
      { name: "Phase", type: "string", jsonPath: ".status.phase" },
      { name: "Tok/s", type: "string", jsonPath: ".status.throughput" },
      { name: "ETA", type: "string", jsonPath: ".status.eta" },
      age,
      ...causeColumns,
    ],
    categories: ["muster", "all"],
    isScaled: true,
    isOwner: true,
  },
  DraftPool: {
    spec: draftPoolSpec,
    status: draftPoolStatus,
    columns: [
      { name: "Ready", type: "string", jsonPath: ".status.ready" },
      { name: "Phase", type: "string", jsonPath: ".status.phase" },
      { name: "Vocabulary", type: "string", jsonPath: ".status.vocabulary" },
      age,
      ...causeColumns,
    ],
    categories: ["muster", "all"],
    isScaled: true,
    isOwner: true,
  },
  ShardPlan: {
    spec: shardPlanSpec,
    status: shardPlanStatus,
    columns: [
      { name: "Model", type: "string", jsonPath: ".spec.model.name" },
      { name: "World", type: "integer", jsonPath: ".spec.cut.world" },
      { name: "TP", type: "integer", jsonPath: ".spec.cut.tp" },
      { name: "EP", type: "integer", jsonPath: ".spec.cut.ep" },
      { name: "ETP", type: "integer", jsonPath: ".spec.cut.etp" },
      { name: "Nodes", type: "integer", jsonPath: ".spec.workers" },
      { name: "Groups", type: "integer", jsonPath: ".status.groups" },
      age,
    ],
    categories: ["muster"],
    isScaled: false,
    isOwner: false,
  },
  ReplicaGroup: {
    spec: replicaGroupSpec,
    status: replicaGroupStatus,
    columns: [
      { name: "Ready", type: "string", jsonPath: ".status.ready" },
      { name: "Phase", type: "string", jsonPath: ".status.phase" },
      { name: "Incarnation", type: "integer", jsonPath: ".status.incarnation" },
      { name: "Restarts", type: "integer", jsonPath: ".status.restarts" },
      { name: "Tok/s", type: "string", jsonPath: ".status.throughput" },
      age,
      ...causeColumns,
    ],
    categories: ["muster"],
    isScaled: false,
    isOwner: false,
  },
};

/** As `kubectl apply` takes it. `keep`: Helm leaves it, and so users' resources, when the chart goes. */
export function crdOf(kind: Kind): JsonSchema {
  const { plural, singular, shortNames } = NAMES[kind];
  const definition = DEFINITIONS[kind];
  return {
    apiVersion: "apiextensions.k8s.io/v1",
    kind: "CustomResourceDefinition",
    metadata: {
      name: `${plural}.${GROUP}`,
      annotations: { "helm.sh/resource-policy": "keep" },
    },
    spec: {
      group: GROUP,
      scope: "Namespaced",
      names: { kind, listKind: `${kind}List`, plural, singular, shortNames, categories: definition.categories },
      versions: [
        {
          name: VERSION,
          served: true,
          storage: true,
          subresources: { status: {}, ...(definition.isScaled ? { scale } : {}) },
          additionalPrinterColumns: definition.columns,
          schema: { openAPIV3Schema: schemaOf(definition) },
        },
      ],
    },
  };
}

const scale = {
  specReplicasPath: ".spec.replicas",
  statusReplicasPath: ".status.replicas",
  labelSelectorPath: ".status.selector",
};

function schemaOf({ spec, status, isOwner }: Definition): JsonSchema {
  const { cel, message } = ownerNameRule;
  return {
    type: "object",
    required: ["spec"],
    ...(isOwner ? { [VALIDATIONS]: [{ rule: cel, message }] } : {}),
    properties: {
      apiVersion: { type: "string" },
      kind: { type: "string" },
      metadata: { type: "object" },
      spec: toStructural(spec),
      status: toStructural(status),
    },
  };
}

/** Every definition, in the order in which they are written. */
export function allCrds(): { kind: Kind; file: string; crd: JsonSchema }[] {
  return KINDS.map((kind) => ({ kind, file: `${NAMES[kind].plural}.yaml`, crd: crdOf(kind) }));
}
