// The status of a ReplicaGroup, whole: what the reconciler and its pods say, in the words of the API. Pure; everything that
// is not said here (record, measurements) stays as it is.
//
//   H1  `observedGeneration` of a group that drains is raised only when nothing of it runs any more: Stopped then means that
//       it may go (reconcile/deployment/rollout.ts).
//   H2  `leader` and `endpoints` are there exactly while it serves.
//   H4  Serving is written of no incarnation of which a pod has been seen to end, however late its turn comes.
//   H3  a cause keeps its age (status.ts S1) over controllers: the next one sees the same thing for the first time.
import {
  type Condition,
  type ConditionType,
  PHASES,
  type PhaseName,
  phaseName,
  setCondition,
  timestampOf,
} from "../../api/conditions.ts";
import type { ReplicaGroup } from "../../api/parse.ts";
import type { ReplicaGroupStatus } from "../../api/replica-group.ts";
import { throughputColumn } from "../../reconcile/deployment/columns.ts";
import type { GroupStatus } from "../../reconcile/status.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf, listOf } from "../api/fields.ts";
import { gangPod, type Reservation } from "../gangs/gang-pods.ts";
import type { GroupNumbers } from "../workers/reports-board.ts";
import type { PlanRead } from "./group-plans.ts";
import { podState } from "./pod-state.ts";
import { podName } from "./pods.ts";

export type Placement = NonNullable<ReplicaGroupStatus["placement"]>;

/** Ranks by worker, in the order of workers. */
export function placementOf(group: KubeObject, { incarnation, seats }: Reservation): Placement {
  let firstRank = 0;
  return seats
    .toSorted((one, other) => one.worker - other.worker)
    .map(({ worker, node, devices }) => {
      const pod = podName({ group, incarnation, worker });
      const placed = { worker, node, pod, firstRank, ranks: devices };
      firstRank += devices;
      return placed;
    });
}

export type Told = {
  group: ReplicaGroup;
  status: GroupStatus;
  placement: Placement;
  /** Of the whole plan. */
  ranks: number;
  /** What its leader has reported; undefined where nothing is known. */
  numbers: GroupNumbers | undefined;
  nowMs: number;
};

const MESSAGE_MAX = 4096;
const CODE_MAX = 64;
const ETA_STEP_MS = 5_000;

export function groupStatusOf(before: unknown, told: Told): unknown {
  const { group, status, placement, ranks } = told;
  const phase = phaseName(status.phase);
  if (phase === undefined) return before;
  const leader = status.leaderAddress === "" ? undefined : status.leaderAddress;
  const bytes = {
    bytesLoaded: status.bytesTotal > 0n ? Number(status.bytesLoaded) : undefined,
    bytesTotal: status.bytesTotal > 0n ? Number(status.bytesTotal) : undefined,
  };
  return plain({
    ...fieldsOf(before),
    observedGeneration: observedOf(group, phase, status),
    phase,
    cause: { ...causeOf(status), since: sinceOf(group, phase, status), ...bytes, eta: etaOf(status) },
    conditions: conditionsOf(told, phase),
    incarnation: Number(status.incarnation),
    restarts: status.restarts,
    placement: placement.length === 0 ? undefined : placement,
    endpoints: leader === undefined ? undefined : [{ worker: 0, address: leader }],
    leader,
    numericsId: status.numericsId === "" ? undefined : status.numericsId,
    readyRanks: status.readyRanks,
    ranks,
    ready: `${status.readyRanks}/${ranks}`,
    ...bytes,
    ...(leader === undefined ? NO_NUMBERS : numbersOf(told.numbers)),
  });
}

const NO_NUMBERS = { tokensPerSecond: undefined, throughput: undefined, step: undefined, stepAt: undefined };
/** Two digits behind the point: nobody reads more, and each other digit would be a write. */
const rounded = (value: number): number => Math.round(value * 100) / 100;

/** Where nothing is known what is there stays: the leader serves on while nobody hears it. */
function numbersOf(numbers: GroupNumbers | undefined): Record<string, unknown> {
  if (numbers === undefined) return {};
  const { tokensPerSecond, step, stepMs } = numbers;
  return {
    ...(step === 0n ? {} : { step: Number(step), stepAt: timestampOf(stepMs) }),
    ...(tokensPerSecond === undefined
      ? {}
      : { tokensPerSecond: rounded(tokensPerSecond), throughput: throughputColumn(tokensPerSecond) }),
  };
}

/** In steps: nobody reads an estimate closer, and each step is a write. */
function etaOf({ etaMs }: GroupStatus): string | undefined {
  return etaMs === undefined ? undefined : timestampOf(Math.ceil(etaMs / ETA_STEP_MS) * ETA_STEP_MS);
}

export const READING = "plan-reading";

/** Why a plan cannot be worked with yet. */
export type Unread = { phase: "Scheduling" | "Infeasible"; code: string; message: string };

export function unread(read: Exclude<PlanRead, { kind: "whole" }>, source: string): Unread {
  switch (read.kind) {
    case "reading":
      return { phase: "Scheduling", code: READING, message: `the headers of ${source} are read again` };
    case "failed":
      return { phase: "Scheduling", code: "source-unreadable", message: `${read.detail}; it is tried again` };
    case "refused": {
      const { code, field, detail } = read.fault;
      return { phase: "Infeasible", code, message: field === "" ? detail : `${field}: ${detail}` };
    }
    default:
      throw new Error(`unreachable: ${JSON.stringify(read satisfies never)}`);
  }
}

/** For a group that nobody looks after yet. What serves goes on serving, and its leader stays known. */
export function waitingStatus(
  before: unknown,
  group: ReplicaGroup,
  said: { phase: PhaseName; code: string; message: string; nowMs: number },
): unknown {
  const { status } = group;
  const phase = status?.leader === undefined ? said.phase : "Degraded";
  const code = said.code.replaceAll("_", "-").slice(0, CODE_MAX);
  const isSame = status?.phase === phase && status.cause?.code === code;
  const since = isSame && status.cause !== undefined ? status.cause.since : timestampOf(said.nowMs);
  return plain({
    ...fieldsOf(before),
    observedGeneration: group.metadata.generation,
    phase,
    cause: { code, message: said.message.slice(0, MESSAGE_MAX), since },
  });
}

/** What people and deployments wait for. */
export function groupHeadline(status: unknown): string {
  const { phase, cause, conditions, observedGeneration, incarnation, leader, placement } = fieldsOf(status);
  const states = Array.isArray(conditions) ? conditions.map(fieldsOf).map(({ type, status: is }) => [type, is]) : [];
  return JSON.stringify([phase, fieldsOf(cause).code, states, observedGeneration, incarnation, leader, placement]);
}

/** H4. `pods`: those of the group, as they are now. What does not say Serving is never less true for being late. */
export function isStillTrue(status: unknown, pods: readonly KubeObject[]): boolean {
  const { phase, incarnation, placement } = fieldsOf(status);
  if (phase !== "Serving") return true;
  const seats = listOf(placement).length;
  const own = pods.filter((pod) => gangPod(pod)?.incarnation === BigInt(Number(incarnation)));
  return seats > 0 && own.length >= seats && own.every((pod) => podState(pod).kind === "running");
}

/** H1. */
function observedOf({ spec, metadata, status: before }: ReplicaGroup, phase: PhaseName, { code }: GroupStatus) {
  const isDone = phase === "Stopped" && code === "stopped";
  return spec.state === "Draining" && !isDone ? before?.observedGeneration : metadata.generation;
}

function causeOf({ code, cause }: GroupStatus) {
  return { code: (code === "" ? "unknown" : code).slice(0, CODE_MAX), message: cause.slice(0, MESSAGE_MAX) };
}

/** H3. */
function sinceOf({ status: before }: ReplicaGroup, phase: PhaseName, status: GroupStatus): string {
  const since = timestampOf(status.sinceMs);
  const isSame =
    before?.phase === phase &&
    before.cause?.code === causeOf(status).code &&
    before.incarnation === Number(status.incarnation);
  const stored = isSame ? before.cause?.since : undefined;
  return stored !== undefined && Date.parse(stored) < Date.parse(since) ? stored : since;
}

function conditionsOf(told: Told, phase: PhaseName): readonly Condition[] {
  const { group, status, placement, nowMs } = told;
  const isServing = phase === "Serving" || (phase === "Degraded" && status.leaderAddress !== "");
  const hasLoaded =
    isServing || (phase !== "Degraded" && phase !== "Stopped" && PHASES.indexOf(phase) >= PHASES.indexOf("Connecting"));
  const is: [ConditionType, boolean][] = [
    ["Placed", placement.length > 0],
    ["Loaded", hasLoaded],
    ["Serving", isServing],
    ["Degraded", phase === "Degraded"],
  ];
  // A leader that has just begun says the generation it looked at, like the status around it.
  const observedGeneration = group.metadata.generation ?? 0;
  return is.reduce<readonly Condition[]>(
    (list, [type, isTrue]) => {
      const message = isTrue === (type !== "Degraded") ? "" : status.cause.slice(0, MESSAGE_MAX);
      const said = { type, status: isTrue ? "True" : "False", reason: phase, message, observedGeneration } as const;
      return setCondition(list, said, nowMs);
    },
    (group.status?.conditions ?? []).filter(({ type }) => is.some(([known]) => known === type)),
  );
}

/** As a server would have it. */
const plain = (value: unknown): unknown => JSON.parse(JSON.stringify(value));
