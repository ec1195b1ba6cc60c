// Status of a group: one phase, one cause, one age. Owns how a cause keeps its age and how the status is shown to
// others (control.proto); decides nothing.
//
//   S1  the age belongs to (phase, code, incarnation): a text that counts bytes does not make its cause younger.
//   S2  a leader address stands only beside a whole incarnation that serves.
import { Phase, type ServedModel } from "../../proto/gen/muster/v1/control.ts";
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";

export type GroupStatus = {
  phase: Phase;
  /** Stable, kebab-case: what the cause is called. */
  code: string;
  /** For a person. */
  cause: string;
  sinceMs: number;
  incarnation: bigint;
  leaderAddress: string;
  numericsId: string;
  readyRanks: number;
  restarts: number;
  bytesLoaded: bigint;
  bytesTotal: bigint;
  /** When this phase is expected to end, where that can be told. */
  etaMs?: number | undefined;
  /** Grows or changes while the group gets on; with `progressMs`, when it last did, it bounds every wait. */
  progress: string;
  progressMs: number;
};

/** What of a status differs from one pass to the next; ages follow from `last`. */
export type Finding = Omit<GroupStatus, "sinceMs" | "progressMs"> & {
  /** Where the world itself says since when. */
  sinceMs?: number;
};

export function statusOf(finding: Finding, last: GroupStatus | undefined, nowMs: number): GroupStatus {
  const isSame =
    last !== undefined &&
    last.phase === finding.phase &&
    last.code === finding.code &&
    last.incarnation === finding.incarnation;
  const hasStood = last !== undefined && last.incarnation === finding.incarnation && last.progress === finding.progress;
  return {
    ...finding,
    sinceMs: finding.sinceMs ?? (isSame ? last.sinceMs : nowMs),
    progressMs: hasStood ? last.progressMs : nowMs,
  };
}

/** Whether a reader would see a difference. */
export function isSameStatus(one: GroupStatus, other: GroupStatus): boolean {
  return (
    one.phase === other.phase &&
    one.code === other.code &&
    one.cause === other.cause &&
    one.sinceMs === other.sinceMs &&
    one.incarnation === other.incarnation &&
    one.leaderAddress === other.leaderAddress &&
    one.numericsId === other.numericsId &&
    one.readyRanks === other.readyRanks &&
    one.restarts === other.restarts &&
    one.bytesLoaded === other.bytesLoaded &&
    one.bytesTotal === other.bytesTotal
  );
}

export type Naming = { name: string; aliases: readonly string[]; createdUnixS: bigint };

/** As gateways and `muster status` see it; `plan` is undefined where there is none that fits. */
export function servedModel(naming: Naming, plan: ShardPlan | undefined, status: GroupStatus): ServedModel {
  return {
    name: naming.name,
    aliases: [...naming.aliases],
    revision: plan?.revision ?? "",
    numericsId: status.numericsId,
    incarnation: status.incarnation,
    leaderAddress: status.leaderAddress,
    phase: status.phase,
    cause: status.cause,
    sinceUnixMs: BigInt(Math.round(status.sinceMs)),
    readyRanks: status.readyRanks,
    world: plan?.cut?.world ?? 0,
    restarts: status.restarts,
    bytesLoaded: status.bytesLoaded,
    bytesTotal: status.bytesTotal,
    contextTokens: plan?.contextTokens ?? 0,
    family: plan?.model?.family ?? "",
    cut: plan?.cut,
    hasChatTemplate: (plan?.model?.tokenizer?.chatTemplate ?? "") !== "",
    createdUnixS: naming.createdUnixS,
    vocabSize: plan?.model?.vocabSize ?? 0,
    replica: "",
    namespace: "",
    deployment: "",
    draining: false,
  };
}

const UNITS = ["B", "KB", "MB", "GB", "TB"];

export function bytesText(bytes: bigint): string {
  let value = Number(bytes);
  let unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${UNITS[unit]}`;
}

export function secondsText(ms: number): string {
  return `${(Math.max(0, ms) / 1000).toFixed(1)} s`;
}

export { Phase };
