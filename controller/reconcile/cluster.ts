// The line between deciding and doing: all that the reconciler may see and do. Implemented over supervised processes
// (controller/local) and, later, over pods (controller/kube); the reconciler knows neither.
//
//   C1  names say everything: a worker is (group, incarnation, worker); two with one name never run at once.
//   C2  apply is idempotent: the same action again changes nothing that already is so, and is no error. When it has
//       resolved, the next observe shows its effect (a started worker is seen, described or not).
//   C3  observe tells what is, not what was wanted; it throws where it cannot tell, and never answers with a guess.
//   C4  the record outlives the process that wrote it; a `record` action replaces it only while the stored incarnation is
//       `replaces` (else it throws: another controller has decided meanwhile). There is always a record: a group nobody
//       has seen before has `freshRecord()`.
import type { LoadRequest, WorkerDescription } from "../../proto/gen/muster/v1/worker.ts";
import type { Inventory } from "../plan/hardware.ts";

export type WorkerName = { group: string; incarnation: bigint; worker: number };

/** What a worker says of itself, or since when it says nothing. */
export type WorkerView =
  | { kind: "described"; description: WorkerDescription }
  /** `last`: what it said before it fell silent, undefined where it has not spoken yet. */
  | { kind: "silent"; sinceMs: number; detail: string; last: WorkerDescription | undefined };

export type WorkerSeen = {
  name: WorkerName;
  /** Where it is; undefined where there are no nodes to tell apart. */
  node?: string | undefined;
  /** Target of its gRPC server. */
  address: string;
  state:
    | { kind: "running"; view: WorkerView }
    | { kind: "exited"; code: number | null; signal: string | null; detail: string };
};

/** `isFinal`: a person must change something, trying again cannot help. */
export type Failure = { atMs: number; detail: string; isFinal: boolean };

/** What cannot be seen again by looking, kept for each group. */
export type GroupRecord = {
  /** The only incarnation that may start or serve. Grows, never shrinks. */
  incarnation: bigint;
  /** Plan revision this incarnation was begun for; empty before the first. */
  revision: string;
  /** Whether workers of this incarnation may exist or have existed. */
  begun: boolean;
  /** Since the last stable serving, oldest first, at most `failuresMax` of the limits. */
  failures: readonly Failure[];
  /** No worker starts before. */
  notBeforeMs: number;
  /** Incarnations that ended by failure, ever. */
  restarts: number;
  /** How many incarnations have failed by each node; at most FAILED_NODES_MAX of them. */
  failedNodes: Readonly<Record<string, number>>;
};

/** Nodes remembered for one group: more than a group is ever unlucky with, and few enough for an object of the API. */
export const FAILED_NODES_MAX = 64;

/** How far the ranks of a group are, as its leader has said last. */
export type StepsSeen = {
  /** Last step that each rank has finished, by rank; empty before the first. */
  epochs: readonly bigint[];
  /** A step has been planned that not all ranks have finished. */
  isPending: boolean;
  /** Since when the lowest epoch has not moved while something was pending; where nothing is, when that was said. */
  sinceMs: number;
  /** When the leader has spoken last. */
  saidMs: number;
  /** Whether its stream stands. */
  isHeard: boolean;
};

export type GroupSeen = {
  group: string;
  record: GroupRecord;
  /** Running ones of every incarnation, exited ones at least of the record's. */
  workers: readonly WorkerSeen[];
  /** Of the record's incarnation; undefined where its leader reports to nobody. */
  steps?: StepsSeen | undefined;
  /** Nodes by whose fault the record's incarnation ends, where it does. */
  blamed?: readonly string[] | undefined;
};

export type Action =
  /** Before anything of an incarnation exists, and to end one. */
  | { kind: "record"; group: string; replaces: bigint; record: GroupRecord }
  | { kind: "start-worker"; name: WorkerName }
  /** Hands the worker its Load; resolves when it has taken it, not when it serves. */
  | { kind: "load-worker"; name: WorkerName; request: LoadRequest }
  /** Asks it to drain and ends it after `graceMs` at the latest; resolves when that is under way. */
  | { kind: "stop-worker"; name: WorkerName; graceMs: number };

export interface Cluster {
  /** What there is to run on. */
  inventory(signal: AbortSignal): Promise<Inventory>;
  observe(group: string, signal: AbortSignal): Promise<GroupSeen>;
  apply(action: Action, signal: AbortSignal): Promise<void>;
  /**
   * Resolves at any change of what observe or inventory would answer that comes after the call, at `untilMs`, or on abort:
   * whichever is first. Never rejects. The loop calls it before it looks.
   */
  changed(signal: AbortSignal, untilMs: number): Promise<void>;
}

export function freshRecord(): GroupRecord {
  return { incarnation: 1n, revision: "", begun: false, failures: [], notBeforeMs: 0, restarts: 0, failedNodes: {} };
}

export function isSameWorker(one: WorkerName, other: WorkerName): boolean {
  return one.group === other.group && one.incarnation === other.incarnation && one.worker === other.worker;
}

export function workerTitle(name: WorkerName): string {
  return `worker ${name.worker} of ${name.group} #${name.incarnation}`;
}
