// What is worth an event: changes between two statuses, each once. Pure.
import type { Condition } from "../../api/conditions.ts";
import type { OwnerEvent, OwnerStatus } from "./world.ts";

const WARNINGS: ReadonlySet<string> = new Set(["Infeasible", "CapacityShort", "Degraded"]);

export function eventsBetween(before: OwnerStatus, after: OwnerStatus): OwnerEvent[] {
  const events: OwnerEvent[] = [];
  const tell = (type: OwnerEvent["type"], reason: string, action: string, note: string): void => {
    events.push({ type, reason, action, note });
  };
  if (after.planName !== undefined && after.planName !== before.planName && isTrue(after, "Planned")) {
    tell("Normal", "Planned", "Plan", conditionOf(after, "Planned")?.message ?? after.planName);
  }
  const { phase, cause } = after;
  const isOther = cause?.code !== before.cause?.code;
  const isNew = phase !== before.phase || (isOther && (WARNINGS.has(phase ?? "") || cause?.code === "node-leaving"));
  if (phase !== undefined && isNew) {
    tell(WARNINGS.has(phase) ? "Warning" : "Normal", phase, "Reconcile", cause?.message ?? phase);
  }
  if (after.targetReplicas !== undefined && after.targetReplicas !== before.targetReplicas) {
    const from = before.targetReplicas === undefined ? "" : ` from ${before.targetReplicas}`;
    tell("Normal", "Scaled", "Autoscale", `${after.targetReplicas} replicas are wanted${from}`);
  }
  if (after.updated !== undefined && before.updated === undefined)
    tell("Normal", "RolloutBegun", "Rollout", after.updated);
  if (after.updated === undefined && before.updated !== undefined) {
    tell("Normal", "RolloutDone", "Rollout", `${after.planName ?? "the plan"} is what all replicas are made from`);
  }
  if (isTrue(after, "BetterPlan") && !isTrue(before, "BetterPlan")) {
    tell("Normal", "BetterPlan", "Plan", conditionOf(after, "BetterPlan")?.message ?? "");
  }
  if (after.speculation !== undefined && after.speculation.active !== (before.speculation?.active ?? false)) {
    const { active, detail } = after.speculation;
    tell(active ? "Normal" : "Warning", active ? "DraftsPaired" : "DraftsLost", "Pair", detail);
  }
  for (const { field, message } of (after.notices ?? []).filter(({ kind }) => kind === "Refused")) {
    const isKnown = before.notices?.some((one) => one.field === field && one.message === message) ?? false;
    if (!isKnown) tell("Warning", "Refused", "Reconcile", `${field}: ${message}`);
  }
  return events;
}

function conditionOf({ conditions = [] }: OwnerStatus, type: Condition["type"]): Condition | undefined {
  return conditions.find((condition) => condition.type === type);
}

const isTrue = (status: OwnerStatus, type: Condition["type"]): boolean => conditionOf(status, type)?.status === "True";
