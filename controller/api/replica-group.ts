// ReplicaGroup: one for each replica. The spec says what it is a copy of; what changes (placement, incarnation, endpoints)
// is status, written under its resourceVersion alone.
import { z } from "zod";
import { cause, conditions, phase } from "./conditions.ts";
import { count, listBy, objectName, timestamp } from "./fields.ts";
import { RANKS_MAX } from "./model-deployment.ts";
import { type EditRule, withRules } from "./rules.ts";

const FAILURES_MAX = 32;
const FAILED_NODES_MAX = 64;

const fields = z.object({
  owner: z
    .object({ kind: z.enum(["ModelDeployment", "DraftPool"]), name: objectName("the owner") })
    .describe("Whose replica it is; as in the owner reference, which this repeats for readers without it."),
  plan: objectName("a ShardPlan of this namespace"),
  ordinal: z.int().min(0).max(1_000_000).describe("Which replica; never used twice by one owner."),
  state: z.enum(["Serving", "Draining"]).default("Serving").describe("Draining: takes nothing new, then goes."),
});

export const replicaGroupEdits: readonly EditRule<z.output<typeof fields>>[] = [
  {
    cel: "self.plan == oldSelf.plan",
    message: "a group keeps its plan: make another ReplicaGroup for another plan",
    holds: (next, before) => next.plan === before.plan,
    at: "plan",
  },
  {
    cel: "self.owner == oldSelf.owner && self.ordinal == oldSelf.ordinal",
    message: "a group keeps its owner and ordinal: make another ReplicaGroup",
    holds: (next, before) =>
      next.owner.kind === before.owner.kind && next.owner.name === before.owner.name && next.ordinal === before.ordinal,
  },
  {
    cel: "oldSelf.state != 'Draining' || self.state == 'Draining'",
    message: "a group that drains does not come back: make another ReplicaGroup",
    holds: (next, before) => before.state !== "Draining" || next.state === "Draining",
    at: "state",
  },
];

export const replicaGroupSpec = withRules(fields, [], replicaGroupEdits);
export type ReplicaGroupSpec = z.infer<typeof replicaGroupSpec>;
export type ReplicaGroupSpecInput = z.input<typeof replicaGroupSpec>;

/** What reconcile's GroupRecord holds, as an object of the API: what cannot be seen again by looking. */
const record = z.object({
  incarnation: count,
  revision: z.string().max(64),
  begun: z.boolean(),
  failures: z
    .array(z.object({ at: z.iso.datetime({ precision: 3 }), detail: z.string().max(1024), isFinal: z.boolean() }))
    .max(FAILURES_MAX)
    .meta({ "x-kubernetes-list-type": "atomic" }),
  notBefore: z.iso.datetime({ precision: 3 }).optional(),
  restarts: count,
  failedNodes: listBy(z.object({ node: z.string().max(253), times: count }), "node", FAILED_NODES_MAX)
    .optional()
    .describe("Nodes that incarnations have failed by; those that did twice are avoided."),
});

const placement = listBy(
  z.object({
    worker: z.int().min(0),
    node: z.string().max(253),
    pod: z.string().max(253),
    firstRank: z.int().min(0),
    ranks: z.int().min(1),
  }),
  "worker",
  RANKS_MAX,
);

const endpoints = listBy(
  z.object({ worker: z.int().min(0), address: z.string().max(512).describe("gRPC target.") }),
  "worker",
  RANKS_MAX,
);

export const replicaGroupStatus = z.object({
  observedGeneration: count.optional(),
  phase: phase.optional(),
  cause: cause.optional(),
  conditions: conditions.optional(),
  record: record.optional(),
  incarnation: count.optional(),
  restarts: count.optional(),
  placement: placement.optional().describe("Where the workers of the incarnation are."),
  endpoints: endpoints.optional().describe("The first is the leader's; empty while it does not serve."),
  leader: z.string().max(512).optional().describe("gRPC target of rank 0 while it serves."),
  numericsId: z.string().max(512).optional(),
  readyRanks: count.optional(),
  ranks: count.optional(),
  ready: z.string().max(32).optional(),
  bytesLoaded: count.optional(),
  bytesTotal: count.optional(),
  tokensPerSecond: z.number().min(0).optional(),
  throughput: z.string().max(32).optional(),
  step: count.optional().describe("Epoch of the last step all ranks have finished."),
  stepAt: timestamp.optional(),
});
export type ReplicaGroupStatus = z.infer<typeof replicaGroupStatus>;
