// Moves the experts of serving groups by their measured load: asks a leader what its experts have served, has the next map
// staged by all workers, and has the leader switch. Owns when a group is looked at and what was counted at the last look; what
// moves is decided by reconcile/expert-moves.ts. Nothing of it is needed to serve, and nothing of it outlives an incarnation.
//
//   E1  one look for each group at a time, at most MOVES_AT_ONCE moves in all; a look ends with its group.
//   E2  a switch is asked for only after every worker has staged the map; what fails before changes nothing, and is tried again
//       at a later look.
//   E3  the map in use is the leader's answer, never a memory: another controller may have moved experts before.

import type { ExpertLoadResponse, ExpertTokens } from "../../../proto/gen/muster/v1/experts.ts";
import type { ExpertMap, ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { expertSlices, planMap } from "../../model/expert-slices.ts";
import { decideExperts, type ExpertLimits, type ExpertVerdict, expertLimits } from "../../reconcile/expert-moves.ts";
import type { Clock } from "../api/clock.ts";
import { Slots } from "../watch/slots.ts";
import type { WorkerTarget } from "../workers/worker-link.ts";
import type { ExpertLinks } from "./expert-link.ts";

/** A group that serves and whose experts may move. */
export type MovableGroup = {
  incarnation: bigint;
  plan: ShardPlan;
  /** By worker; the first leads. */
  targets: readonly WorkerTarget[];
};

/** The map in use, of this incarnation. */
export type MapSeen = { map: ExpertMap; incarnation: bigint };
export type Moved = MapSeen & { text: string; numericsId: string; imbalance: { before: number; after: number } };

export type ExpertMoverOptions = {
  links: ExpertLinks;
  clock: Clock;
  /** Between two looks. */
  lookMs?: number;
  limits?: ExpertLimits;
  /** Of the last steps; 0: not known. */
  stepMsOf: (group: string) => number;
  /** When a group is taken up. */
  onSeen?: (group: string, seen: MapSeen) => void;
  onMoved: (group: string, moved: Moved) => void;
  onFailure: (group: string, detail: string) => void;
};

const LOOK_MS = 60_000;
const MOVES_AT_ONCE = 4;

type Entry = { group: MovableGroup; stop: AbortController; done: Promise<void> };

export class ExpertMover {
  readonly #options: ExpertMoverOptions;
  readonly #slots = new Slots(MOVES_AT_ONCE);
  readonly #entries = new Map<string, Entry>();

  constructor(options: ExpertMoverOptions) {
    this.#options = options;
  }

  /** From now on, or (undefined) no more: it does not serve, or its experts shall stay. */
  set(key: string, group: MovableGroup | undefined): void {
    const known = this.#entries.get(key);
    if (group !== undefined && known?.group.incarnation === group.incarnation && known.group.plan === group.plan)
      return;
    known?.stop.abort();
    this.#entries.delete(key);
    if (group === undefined) return;
    const stop = new AbortController();
    this.#entries.set(key, { group, stop, done: this.#look(key, group, stop.signal) });
  }

  /** Resolves when nothing is under way any more. */
  async close(): Promise<void> {
    const entries = [...this.#entries.values()];
    for (const key of [...this.#entries.keys()]) this.set(key, undefined);
    await Promise.all(entries.map(({ done }) => done));
  }

  async #look(key: string, group: MovableGroup, signal: AbortSignal): Promise<void> {
    const { clock, lookMs = LOOK_MS, onFailure } = this.#options;
    let before: ExpertLoadResponse | undefined;
    while (!signal.aborted) {
      try {
        before = await this.#lookOnce(key, group, { before, signal });
      } catch (error) {
        if (signal.aborted) return;
        onFailure(key, `experts stay where they are: ${error instanceof Error ? error.message : String(error)}`);
      }
      await clock.sleep(signal, clock.nowMs() + lookMs);
    }
  }

  /** Answers what the next look compares with. */
  async #lookOnce(
    key: string,
    group: MovableGroup,
    { before, signal }: { before: ExpertLoadResponse | undefined; signal: AbortSignal },
  ): Promise<ExpertLoadResponse> {
    const { links, limits = expertLimits, lookMs = LOOK_MS, stepMsOf, onSeen } = this.#options;
    const leader = leaderOf(group);
    const now = await links.expertLoad(leader, signal);
    signal.throwIfAborted();
    const current = now.map ?? planMap(group.plan);
    if (before === undefined) onSeen?.(key, { map: current, incarnation: group.incarnation });
    const load = windowOf(before, now);
    if (load === undefined) return now;
    const question = { plan: group.plan, current, load, stepMs: stepMsOf(key), windowMs: lookMs };
    const verdict = decideExperts(question, limits);
    // A window that says too little goes on.
    if (verdict.kind === "stay") return verdict.code === "load-small" ? (before ?? now) : now;
    const leave = await this.#slots.enter(signal);
    try {
      await this.#move(key, group, { current, verdict, signal });
    } finally {
      leave();
    }
    return now;
  }

  async #move(
    key: string,
    { plan, targets, incarnation }: MovableGroup,
    { current, verdict, signal }: Move,
  ): Promise<void> {
    const { links, onMoved } = this.#options;
    const { map, text, imbalance } = verdict;
    const staging = targets.map((target, worker) => {
      const slices = expertSlices(plan, { current, next: map }, worker);
      return links.stageExperts(target, { incarnation, map, slices }, signal);
    });
    await settledAll(staging);
    const [leader] = targets;
    if (leader === undefined) return;
    const { numericsId } = await links.switchExperts(leader, map.version, signal);
    onMoved(key, { map, incarnation, text, numericsId, imbalance });
  }
}

type Move = {
  current: Parameters<typeof expertSlices>[1]["current"];
  verdict: Extract<ExpertVerdict, { kind: "move" }>;
  signal: AbortSignal;
};

/** Rejects with the first failure, once all have ended: nobody is still reading when the next map is staged. */
async function settledAll(work: readonly Promise<void>[]): Promise<void> {
  for (const result of await Promise.allSettled(work)) if (result.status === "rejected") throw result.reason;
}

function leaderOf({ targets }: MovableGroup): WorkerTarget {
  const [leader] = targets;
  if (leader === undefined) throw new Error("the group has no workers");
  return leader;
}

/** What was served between two answers of one engine; undefined where they cannot be compared. */
export function windowOf(
  before: ExpertLoadResponse | undefined,
  now: ExpertLoadResponse,
): readonly ExpertTokens[] | undefined {
  if (before === undefined || before.layers.length !== now.layers.length) return undefined;
  const layers = now.layers.map(({ block, tokens }, index) => {
    const old = before.layers[index];
    return { block, tokens: tokens.map((count, expert) => count - (old?.tokens[expert] ?? 0n)) };
  });
  return layers.some(({ tokens }) => tokens.some((count) => count < 0n)) ? undefined : layers;
}
