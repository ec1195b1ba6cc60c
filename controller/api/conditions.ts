// What a status says of an object: conditions, and the one cause with its age. Owns the words and how a condition keeps
// its transition time; decides nothing.
//
//   A1  lastTransitionTime moves only when the status of the condition changes.
//   A2  an update that says nothing new answers the very list it was given.
import { z } from "zod";
import { Phase } from "../../proto/gen/muster/v1/control.ts";
import { count, listBy, timestamp } from "./fields.ts";

/** Why a phase comes where it does: DESIGN.md section 2. Of several, the first that holds is the cause. */
export const PHASES = [
  "Infeasible",
  "CapacityShort",
  "Scheduling",
  "Pulling",
  "Loading",
  "Connecting",
  "Warming",
  "Serving",
  "Degraded",
  "Stopped",
] as const;
export const phase = z.enum(PHASES);
export type PhaseName = z.infer<typeof phase>;

const BY_PROTO: ReadonlyMap<Phase, PhaseName> = new Map([
  [Phase.INFEASIBLE, "Infeasible"],
  [Phase.CAPACITY_SHORT, "CapacityShort"],
  [Phase.SCHEDULING, "Scheduling"],
  [Phase.PULLING, "Pulling"],
  [Phase.LOADING, "Loading"],
  [Phase.CONNECTING, "Connecting"],
  [Phase.WARMING, "Warming"],
  [Phase.SERVING, "Serving"],
  [Phase.DEGRADED, "Degraded"],
  [Phase.STOPPED, "Stopped"],
]);

/** Undefined for a phase that says nothing. */
export function phaseName(value: Phase): PhaseName | undefined {
  return BY_PROTO.get(value);
}

export function protoPhase(name: PhaseName): Phase {
  return [...BY_PROTO].find(([, known]) => known === name)?.[0] ?? Phase.UNSPECIFIED;
}

const CODE_MAX = 64;
const MESSAGE_MAX = 4096;
const MESSAGE = z.string().max(MESSAGE_MAX);

export const cause = z
  .object({
    code: z.string().max(CODE_MAX).describe("Stable, kebab-case: what the cause is called."),
    message: MESSAGE.describe("For a person."),
    since: timestamp.describe("Since when it is so."),
    bytesLoaded: count.optional(),
    bytesTotal: count.optional(),
    eta: timestamp.optional().describe("When this phase is expected to end."),
  })
  .describe("The one cause of the phase.");
export type Cause = z.infer<typeof cause>;

export const CONDITION_TYPES = ["Planned", "Placed", "Loaded", "Serving", "Degraded", "BetterPlan"] as const;
export type ConditionType = (typeof CONDITION_TYPES)[number];

export const condition = z.object({
  type: z.enum(CONDITION_TYPES),
  status: z.enum(["True", "False", "Unknown"]),
  reason: z
    .string()
    .min(1)
    .max(128)
    .regex(/^[A-Za-z]([A-Za-z0-9]*)$/),
  message: MESSAGE,
  lastTransitionTime: timestamp,
  observedGeneration: z.int().min(0),
});
export type Condition = z.infer<typeof condition>;

export const conditions = listBy(condition, "type", CONDITION_TYPES.length);

/** Whole seconds, as metav1.Time has them. */
export function timestampOf(ms: number): string {
  return new Date(Math.floor(ms / 1000) * 1000).toISOString().replace(".000Z", "Z");
}

/** A1, A2. Mutates nothing; the list keeps the order of CONDITION_TYPES. */
export function setCondition(
  list: readonly Condition[],
  update: Omit<Condition, "lastTransitionTime">,
  nowMs: number,
): readonly Condition[] {
  const before = list.find(({ type }) => type === update.type);
  if (before !== undefined && isSameCondition(before, update)) return list;
  const isTransition = before === undefined || before.status !== update.status;
  const next: Condition = {
    type: update.type,
    status: update.status,
    reason: update.reason,
    message: update.message.slice(0, MESSAGE_MAX),
    lastTransitionTime: isTransition ? timestampOf(nowMs) : before.lastTransitionTime,
    observedGeneration: update.observedGeneration,
  };
  const others = list.filter(({ type }) => type !== update.type);
  const place = ({ type }: Condition) => CONDITION_TYPES.indexOf(type);
  return [...others, next].sort((one, other) => place(one) - place(other));
}

function isSameCondition(before: Condition, update: Omit<Condition, "lastTransitionTime">): boolean {
  return (
    before.status === update.status &&
    before.reason === update.reason &&
    before.message === update.message.slice(0, MESSAGE_MAX) &&
    before.observedGeneration === update.observedGeneration
  );
}

/** `since` is kept while phase and code stay (status S1); a text that counts bytes does not make a cause younger. */
export function setCause(
  before: { phase: PhaseName; cause: Cause } | undefined,
  next: { phase: PhaseName; cause: Omit<Cause, "since"> },
  nowMs: number,
): { phase: PhaseName; cause: Cause } {
  const isSame = before !== undefined && before.phase === next.phase && before.cause.code === next.cause.code;
  return {
    phase: next.phase,
    cause: {
      ...next.cause,
      message: next.cause.message.slice(0, MESSAGE_MAX),
      since: isSame ? before.cause.since : timestampOf(nowMs),
    },
  };
}
