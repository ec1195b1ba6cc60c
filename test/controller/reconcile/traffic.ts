// Traffic in virtual time: requests of a trace meet simulated replicas whose number the autoscaler sets. A replica runs up to
// `concurrency` sequences; a prompt is read at a fixed rate, a token takes longer the more sequences run. Nothing here waits.
import {
  autoscale,
  freshState,
  HISTORY_MS,
  type LoadSample,
  type ScaleDecision,
  type ScaleLimits,
  type ScalePolicy,
  scaleLimits,
} from "../../../controller/reconcile/autoscale.ts";

export type TracedRequest = { atMs: number; context: number; generated: number };

export type ReplicaModel = {
  concurrency: number;
  /** Until a started replica takes requests. */
  startMs: number;
  prefillTokensPerSecond: number;
  /** Between tokens: alone, and for each further sequence. */
  itlMs: number;
  itlMsPerSequence: number;
};

export type Change = { atMs: number; from: number; to: number; code: string };

export type Outcome = {
  requests: number;
  /** Share whose first token came within the target. */
  withinTtft: number;
  ttftWorstMs: number;
  replicaSeconds: number;
  peak: number;
  changes: Change[];
  /** Every decision, where asked for. */
  decisions: ScaleDecision[];
};

type Sequence = { left: number; prefillMs: number; arrivedMs: number };
type Replica = { readyMs: number; isDraining: boolean; running: Sequence[] };

const TICK_MS = 1000;
const LOOK_MS = 5000;

export type Run = {
  policy: ScalePolicy;
  replica: ReplicaModel;
  limits?: ScaleLimits;
  start: number;
  /** Fixed number of replicas instead of the autoscaler. */
  fixed?: number;
  /** Virtual time that is played after the last request. */
  tailMs?: number;
  keepDecisions?: boolean;
};

export function play(trace: readonly TracedRequest[], run: Run): Outcome {
  const bed = new Bed(run);
  const endMs = (trace.at(-1)?.atMs ?? 0) + (run.tailMs ?? 60_000);
  let next = 0;
  // A bed that is too small for its traffic is not watched for ever: what never began counts as late.
  for (let nowMs = 0; nowMs <= endMs || (bed.isBusy && nowMs < 2 * endMs); nowMs += TICK_MS) {
    for (; (trace[next]?.atMs ?? Number.POSITIVE_INFINITY) <= nowMs; next++) {
      const request = trace[next];
      if (request) bed.arrive(request);
    }
    bed.tick(nowMs);
    if (nowMs % LOOK_MS === 0) bed.look(nowMs);
  }
  return bed.outcome(trace.length, run.policy.targets.ttftMs ?? Number.POSITIVE_INFINITY);
}

class Bed {
  readonly #run: Run;
  readonly #replicas: Replica[] = [];
  readonly #queue: Sequence[] = [];
  readonly #history: LoadSample[] = [];
  readonly #first: number[] = [];
  readonly #recent: { atMs: number; ttftMs: number }[] = [];
  readonly #changes: Change[] = [];
  readonly #decisions: ScaleDecision[] = [];
  #state;
  #arrivals = 0;
  #tokens = 0;
  #replicaSeconds = 0;
  #peak = 0;

  constructor(run: Run) {
    this.#run = run;
    this.#state = freshState(run.fixed ?? run.start, 0);
    this.#scaleTo(run.fixed ?? run.start, -run.replica.startMs);
  }

  get isBusy(): boolean {
    return this.#queue.length > 0 || this.#replicas.some((replica) => replica.running.length > 0);
  }

  arrive({ atMs, context, generated }: TracedRequest): void {
    const prefillMs = (context / this.#run.replica.prefillTokensPerSecond) * 1000;
    this.#queue.push({ left: Math.max(1, generated), prefillMs, arrivedMs: atMs });
    this.#arrivals++;
  }

  tick(nowMs: number): void {
    const { replica: model } = this.#run;
    const open = this.#replicas.filter((replica) => replica.readyMs <= nowMs && !replica.isDraining);
    while (this.#queue.length > 0) {
      const least = open.reduce<Replica | undefined>(
        (best, each) => (best && best.running.length <= each.running.length ? best : each),
        undefined,
      );
      if (least === undefined || least.running.length >= model.concurrency) break;
      const sequence = this.#queue.shift();
      if (sequence === undefined) break;
      least.running.push(sequence);
      const ttftMs = Math.max(0, nowMs - sequence.arrivedMs) + sequence.prefillMs;
      this.#first.push(ttftMs);
      this.#recent.push({ atMs: nowMs, ttftMs });
    }
    for (const replica of this.#replicas) {
      const itlMs = model.itlMs + model.itlMsPerSequence * replica.running.length;
      for (const sequence of replica.running) {
        const busy = Math.min(TICK_MS, sequence.prefillMs);
        sequence.prefillMs -= busy;
        const tokens = Math.min(sequence.left, (TICK_MS - busy) / itlMs);
        sequence.left -= tokens;
        this.#tokens += tokens;
      }
      replica.running = replica.running.filter((sequence) => sequence.left > 1e-9);
    }
    this.#remove((replica) => replica.isDraining && replica.running.length === 0);
    this.#replicaSeconds += (this.#replicas.length * TICK_MS) / 1000;
    this.#peak = Math.max(this.#peak, this.#replicas.length);
  }

  look(nowMs: number): void {
    const { policy, replica: model, fixed, limits = scaleLimits } = this.#run;
    while ((this.#recent[0]?.atMs ?? nowMs) < nowMs - LOOK_MS) this.#recent.shift();
    const ttfts = this.#recent.map(({ ttftMs }) => ttftMs).toSorted((one, other) => one - other);
    const ready = this.#replicas.filter((replica) => replica.readyMs <= nowMs && !replica.isDraining);
    const rows = Math.max(0, ...ready.map((replica) => replica.running.length));
    this.#history.push({
      atMs: nowMs,
      serving: ready.length,
      queue: this.#queue.length,
      running: this.#replicas.reduce((sum, replica) => sum + replica.running.length, 0),
      arrivals: this.#arrivals,
      tokensPerSecond: this.#tokens / (LOOK_MS / 1000),
      ttftMs: ttfts[Math.floor(ttfts.length * 0.9)],
      itlMs: rows === 0 ? undefined : model.itlMs + model.itlMsPerSequence * rows,
    });
    this.#arrivals = 0;
    this.#tokens = 0;
    while ((this.#history[0]?.atMs ?? nowMs) < nowMs - HISTORY_MS) this.#history.shift();
    if (fixed !== undefined) return;
    const decision = autoscale({ nowMs, history: this.#history, policy, state: this.#state }, limits);
    if (this.#run.keepDecisions) this.#decisions.push(decision);
    const { target } = this.#state;
    this.#state = decision.state;
    if (decision.targetReplicas === target) return;
    this.#changes.push({ atMs: nowMs, from: target, to: decision.targetReplicas, code: decision.reason.code });
    this.#scaleTo(decision.targetReplicas, nowMs);
  }

  /** Of what goes, the youngest that do not serve yet go first, then the least busy; these drain. */
  #scaleTo(count: number, nowMs: number): void {
    const alive = this.#replicas.filter((replica) => !replica.isDraining);
    for (let more = alive.length; more < count; more++) {
      this.#replicas.push({ readyMs: nowMs + this.#run.replica.startMs, isDraining: false, running: [] });
    }
    const leaving = alive.toSorted((a, b) => a.running.length - b.running.length || b.readyMs - a.readyMs);
    for (const replica of leaving.slice(0, Math.max(0, alive.length - count))) replica.isDraining = true;
  }

  #remove(isGone: (replica: Replica) => boolean): void {
    for (let index = this.#replicas.length - 1; index >= 0; index--) {
      const replica = this.#replicas[index];
      if (replica && isGone(replica)) this.#replicas.splice(index, 1);
    }
  }

  outcome(requests: number, targetMs: number): Outcome {
    return {
      requests,
      withinTtft: this.#first.filter((ttftMs) => ttftMs <= targetMs).length / Math.max(1, requests),
      ttftWorstMs: this.#first.reduce((worst, ttftMs) => Math.max(worst, ttftMs), 0),
      replicaSeconds: this.#replicaSeconds,
      peak: this.#peak,
      changes: this.#changes,
      decisions: this.#decisions,
    };
  }
}

/** Mulberry32: the same numbers everywhere, so that a generated trace can be compared with the committed one. */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** Poisson arrivals of each minute, for a rate in requests per second that may change from minute to minute. */
export function countsPerMinute(rateAt: (minute: number) => number, minutes: number, seed: number): number[] {
  const random = seeded(seed);
  return Array.from({ length: minutes }, (_, minute) => {
    let count = 0;
    for (let second = 0; second < 60; second++) {
      // Knuth's product of uniforms: exact for the small rate of a second.
      for (let product = random(); product > Math.exp(-rateAt(minute)); product *= random()) count++;
    }
    return count;
  });
}

/** Requests spread over their minutes, with the long tails of real sizes. */
export function requestsOf(counts: readonly number[], seed: number): TracedRequest[] {
  const random = seeded(seed);
  const size = (median: number, spread: number, max: number): number =>
    Math.min(max, Math.max(1, Math.round(median * Math.exp(spread * (random() + random() + random() - 1.5) * 2))));
  const requests = counts.flatMap((count, minute) =>
    Array.from({ length: count }, (): TracedRequest => {
      const atMs = minute * 60_000 + Math.floor(random() * 60_000);
      return { atMs, context: size(700, 1, 16_000), generated: size(130, 0.8, 2000) };
    }),
  );
  return requests.toSorted((one, other) => one.atMs - other.atMs);
}
