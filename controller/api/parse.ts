// From unknown objects to typed ones. What a user writes is refused where it holds an unknown field; what the controller
// wrote is read leniently, so that an older controller can read a newer one's status.
import { z } from "zod";
import { invalid } from "../../proto/fault.ts";
import type { Fault } from "../../proto/gen/muster/v1/worker.ts";
import { draftPoolSpec, draftPoolStatus } from "./draft-pool.ts";
import { API_VERSION, type Kind, metadata, OWNER_NAME_MAX } from "./meta.ts";
import { modelDeploymentEdits, modelDeploymentSpec, modelDeploymentStatus } from "./model-deployment.ts";
import { replicaGroupEdits, replicaGroupSpec, replicaGroupStatus } from "./replica-group.ts";
import { type EditRule, type Rule, refusedEdits } from "./rules.ts";
import { shardPlanEdits, shardPlanSpec, shardPlanStatus } from "./shard-plan.ts";

const OWNER_NAME = "^[a-z]([-a-z0-9]*[a-z0-9])?$";
const isOwnerName = new RegExp(OWNER_NAME);

/** Names of pods, groups and host names are made from these two kinds' names. */
export const ownerNameRule: Rule<string> = {
  cel: `self.metadata.name.size() <= ${OWNER_NAME_MAX} && self.metadata.name.matches('${OWNER_NAME}')`,
  message: `host names are made from this name: write at most ${OWNER_NAME_MAX} of a-z, 0-9 and "-", a letter first`,
  holds: (name) => name.length <= OWNER_NAME_MAX && isOwnerName.test(name),
};

const resource = <K extends Kind, S extends z.ZodType, T extends z.ZodType>(kind: K, spec: S, status: T) =>
  z.looseObject({
    apiVersion: z.literal(API_VERSION),
    kind: z.literal(kind),
    metadata,
    spec,
    status: status.optional(),
  });

const modelDeployment = resource("ModelDeployment", modelDeploymentSpec, modelDeploymentStatus);
const draftPool = resource("DraftPool", draftPoolSpec, draftPoolStatus);
const shardPlan = resource("ShardPlan", shardPlanSpec, shardPlanStatus);
const replicaGroup = resource("ReplicaGroup", replicaGroupSpec, replicaGroupStatus);

export type ModelDeployment = z.infer<typeof modelDeployment>;
export type DraftPool = z.infer<typeof draftPool>;
export type ShardPlanResource = z.infer<typeof shardPlan>;
export type ReplicaGroup = z.infer<typeof replicaGroup>;

/** A value or why there is none. */
export type Parsed<T> = { kind: "ok"; value: T } | { kind: "refused"; fault: Fault };

export const parseModelDeployment = (object: unknown): Parsed<ModelDeployment> => owned(parse(modelDeployment, object));
export const parseDraftPool = (object: unknown): Parsed<DraftPool> => owned(parse(draftPool, object));
export const parseShardPlan = (object: unknown): Parsed<ShardPlanResource> => parse(shardPlan, object);
export const parseReplicaGroup = (object: unknown): Parsed<ReplicaGroup> => parse(replicaGroup, object);

function owned<T extends { metadata: { name: string } }>(parsed: Parsed<T>): Parsed<T> {
  if (parsed.kind === "refused" || ownerNameRule.holds(parsed.value.metadata.name)) return parsed;
  return { kind: "refused", fault: invalid("metadata.name", ownerNameRule.message) };
}

/** Why an edit of a spec is refused; undefined where it is not, or where a side is no such spec at all. */
export function editFault(kind: Kind, before: unknown, next: unknown): Fault | undefined {
  switch (kind) {
    case "ModelDeployment":
      return firstRefused(modelDeploymentSpec, modelDeploymentEdits, { before, next });
    case "ShardPlan":
      return firstRefused(shardPlanSpec, shardPlanEdits, { before, next });
    case "ReplicaGroup":
      return firstRefused(replicaGroupSpec, replicaGroupEdits, { before, next });
    case "DraftPool":
      return undefined;
    default:
      throw new Error(`unreachable: kind ${kind satisfies never}`);
  }
}

type Sides = { before: unknown; next: unknown };

function firstRefused<S extends z.ZodType>(schema: S, edits: readonly EditRule<z.output<S>>[], sides: Sides) {
  const before = schema.safeParse(sides.before);
  const next = schema.safeParse(sides.next);
  if (!before.success || !next.success) return undefined;
  const [refused] = refusedEdits(edits, next.data, before.data);
  return refused === undefined ? undefined : invalid(refused.at, refused.message);
}

function parse<S extends z.ZodType>(schema: S, object: unknown): Parsed<z.output<S>> {
  const result = schema.safeParse(withoutNulls(object), { reportInput: true });
  if (result.success) return { kind: "ok", value: result.data };
  const { issues } = result.error;
  const [first] = issues;
  if (first === undefined) return { kind: "refused", fault: invalid("", "it is not a valid object") };
  const { field, detail } = said(first);
  const more = issues.length > 1 ? ` (and ${issues.length - 1} more)` : "";
  return { kind: "refused", fault: invalid(field, `${detail}${more}`) };
}

/** A field that is null is left out, as the API server has it; in lists null stays and is refused. */
function withoutNulls(value: unknown): unknown {
  // Nearly every object has none: it is read as it is, without a copy.
  if (!hasNullField(value)) return value;
  if (Array.isArray(value)) return value.map(withoutNulls);
  if (typeof value !== "object" || value === null) return value;
  const held = Object.entries(value).filter(([, one]) => one !== null);
  return Object.fromEntries(held.map(([key, one]) => [key, withoutNulls(one)]));
}

function hasNullField(value: unknown): boolean {
  if (typeof value !== "object" || value === null) return false;
  if (Array.isArray(value)) return value.some(hasNullField);
  return Object.values(value).some((one) => one === null || hasNullField(one));
}

/** `spec.podPatch.env[0].name`, as the API server writes it. */
function fieldOf(path: readonly PropertyKey[]): string {
  return path.reduce<string>((all, key) => {
    if (typeof key === "number") return `${all}[${key}]`;
    const name = String(key);
    if (!/^\w+$/.test(name)) return `${all}[${name}]`;
    return all === "" ? name : `${all}.${name}`;
  }, "");
}

/** zod's issue as a sentence that names what to write. */
function said(issue: z.core.$ZodIssue): { field: string; detail: string } {
  const field = fieldOf(issue.path);
  switch (issue.code) {
    case "unrecognized_keys": {
      const [key = ""] = issue.keys;
      return { field: fieldOf([...issue.path, key]), detail: "unknown field: remove it" };
    }
    case "invalid_type":
      return { field, detail: issue.input === undefined ? "is required" : `write a value of type ${issue.expected}` };
    case "invalid_value":
      return { field, detail: `write one of ${issue.values.map(String).join(", ")}` };
    case "too_small":
      return { field, detail: `write ${issue.inclusive ? "at least" : "more than"} ${issue.minimum}${unit(issue)}` };
    case "too_big":
      return { field, detail: `write ${issue.inclusive ? "at most" : "less than"} ${issue.maximum}${unit(issue)}` };
    default:
      return { field, detail: issue.message };
  }
}

function unit({ origin }: { origin: string }): string {
  if (origin === "string") return " characters";
  return origin === "array" ? " entries" : "";
}
