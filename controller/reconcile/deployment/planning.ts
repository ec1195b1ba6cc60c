// Asking the planner for an owner: which inventories in which order, and what its answer means. Pure but for readModel, which
// whoever calls it keeps off the hot path (controller/kube/owners/plan-desk.ts).

import { FaultError } from "../../../proto/fault.ts";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import { type Fault, Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";
import { formatFault, kvBytesOf } from "../../api/mapping.ts";
import { type ShardPlanSpec, toResource } from "../../api/shard-plan.ts";
import { readModel } from "../../model/model.ts";
import { type Recording, recordedSource } from "../../model/sources/recorded.ts";
import { deviceCount, type Inventory, type InventoryNode } from "../../plan/hardware.ts";
import { type Planned, planShards } from "../../plan/plan.ts";
import { type Wishes, wishesOf } from "../../plan/wishes.ts";
import type { Question } from "./wish.ts";

/** `free`: what nobody holds. `all`: what there is. */
export type Grounds = { free: Inventory; all: Inventory };

export type Ask = {
  question: Question;
  grounds: Grounds;
  calibration: number | undefined;
  /** Where only pods reach the source: what one of them has read there. */
  recording?: Recording | undefined;
};

export type Planning =
  | { kind: "feasible"; spec: ShardPlanSpec; isShort: boolean }
  | { kind: "infeasible"; reasons: readonly { code: string; text: string }[]; remedy: string | undefined }
  | { kind: "refused"; fault: Fault }
  | { kind: "failed"; detail: string };

/** What an answer was made from: the cuts that were compared, on which inventory, for which wishes. */
export type Judged = { planned: Planned; inventory: Inventory; wishes: Wishes };
export type OnJudged = (model: ModelSpec, judged: Judged) => void;

/** Reads headers only. Resolves for every source; throws only where the program is broken. */
export async function planQuestion(ask: Ask, onJudged?: OnJudged): Promise<Planning> {
  const { recording, question } = ask;
  const place = recording === undefined ? {} : { place: recordedSource(recording) };
  try {
    const model = await readModel(question.source.url, { ...place, headersOnly: true, tokenizer: true });
    return answerFor(model, ask, onJudged);
  } catch (error) {
    if (!(error instanceof FaultError)) throw error;
    const { fault } = error;
    if (fault.kind === Fault_Kind.TRANSIENT) return { kind: "failed", detail: error.message };
    const detail = fault.field === "" ? fault.detail : `${fault.field}: ${fault.detail}`;
    return { kind: "refused", fault: { ...fault, field: "spec.model.source", detail } };
  }
}

/** What is free and leaves room for all replicas, then all that is free, then all that there is. Throws FaultError (F3). */
export function answerFor(model: ModelSpec, { question, grounds, calibration }: Ask, onJudged?: OnJudged): Planning {
  const fault = formatFault(question.format, model);
  if (fault !== undefined) return { kind: "refused", fault };
  const { free, all } = grounds;
  const tries: [Inventory, isShort: boolean][] = [
    [shareOf(free, question.replicas), false],
    [free, question.replicas > 1],
    [shareOf(all, question.replicas), true],
    [all, true],
  ];
  let last: Planned | undefined;
  for (const [inventory, isShort] of tries) {
    if (inventory.nodes.length === 0) continue;
    const memory = memoryOf(inventory);
    const wishes = wishesOf({
      ...question.plan,
      kvBytes: kvBytesOf(question.kvFraction, memory),
      ...(calibration === undefined ? {} : { calibration }),
    });
    const planned = planShards(model, inventory, wishes);
    onJudged?.(model, { planned, inventory, wishes });
    if (planned.kind === "feasible") {
      const packaging = { image: "", podTemplateDigest: "", calibration: wishes.calibration };
      return { kind: "feasible", spec: toResource(planned.plan, packaging), isShort };
    }
    last = planned;
  }
  if (last === undefined) return { kind: "infeasible", reasons: [NO_NODES], remedy: undefined };
  if (last.kind !== "infeasible") throw new Error("a feasible plan was passed over");
  const reasons = last.reasons.map(({ code, text }) => ({ code, text }));
  return { kind: "infeasible", reasons, remedy: last.remedy?.text };
}

const NO_NODES = {
  code: "no-nodes",
  text: "no node has GPUs that this may use: look at gpu.product, gpu.nodeSelector, gpu.tolerations and gpu.topology, and at the notices.",
};

const roomOf = (node: InventoryNode): number => (node.kind === "gpu" ? node.devices.length : 1);

function memoryOf({ nodes }: Inventory): number {
  const devices = nodes.flatMap((node) => (node.kind === "gpu" ? node.devices : [node.host]));
  return devices.reduce((least, { memoryBytes }) => Math.min(least, memoryBytes), Number.POSITIVE_INFINITY);
}

/** What one of `replicas` may have: the largest nodes, at most its part of the devices. Empty where it is less than one. */
export function shareOf(inventory: Inventory, replicas: number): Inventory {
  let left = Math.floor(deviceCount(inventory) / replicas);
  if (replicas === 1) return inventory;
  const nodes: InventoryNode[] = [];
  for (const node of inventory.nodes.toSorted((one, other) => roomOf(other) - roomOf(one))) {
    const take = Math.min(left, roomOf(node));
    if (take === 0) break;
    nodes.push(node.kind === "gpu" ? { ...node, devices: node.devices.slice(0, take) } : node);
    left -= take;
  }
  return { nodes };
}
