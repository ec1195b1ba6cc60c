// How many replicas a deployment shall have, from measured load. Owns the policy; owns no measurement, no clock and no memory
// beyond the state it hands back, which the caller keeps (or begins anew with freshState: that only waits longer).
//
//   S1  same history, policy and state: same decision.
//   S2  the target stays within min and max. It is 0 only where min is 0 and nothing was asked for during `idleMs`.
//   S3  one change at most doubles the target or adds `stepUpMin`, and at most takes half of it or one replica away;
//       only falling asleep and bounds edited by a person go further.
//   S4  it grows at most once in `upCoolMs`. It shrinks to the most that was wanted during the last `calmMs`, at most once in
//       `meanMs`, and not before `calmMs` has passed since it grew.
//   S5  without a fresh measurement nothing changes but the bounds: what cannot be seen is no load of zero.
//   S6  a waiting request wakes a sleeping deployment at once.

// Room is left for chance by the square-root rule: independent requests vary by about the square root of their mean, so mean +
// k square roots are provided for. Growing takes a small k, shrinking a larger one: between them it rests, at any size. (Fixed
// shares, such as "grow over 80 %, shrink under 60 %", turn back and forth for ever where a replica holds few sequences.)

/** One look at all replicas and the gateways before them. */
export type LoadSample = {
  atMs: number;
  /** Replicas that take requests. */
  serving: number;
  /** Requests that wait, in gateways and leaders. */
  queue: number;
  running: number;
  /** Requests that came since the sample before. */
  arrivals: number;
  /** Generated, over all replicas. */
  tokensPerSecond: number;
  /** 90th percentile of what began or ran since the sample before; undefined where nothing did. */
  ttftMs: number | undefined;
  itlMs: number | undefined;
};

export type ScalePolicy = {
  min: number;
  max: number;
  targets: { queue?: number | undefined; ttftMs?: number | undefined; itlMs?: number | undefined };
  /** Sequences of one replica at once: the plan's. */
  concurrency: number;
  /** Of one full replica, predicted or better measured; undefined: only concurrency counts. */
  tokensPerSecond: number | undefined;
  /** From a decision to a serving replica: so far ahead a rising load is followed. */
  startMs: number;
};

export type ScaleLimits = {
  /** Older samples say nothing about now. */
  sampleAgeMaxMs: number;
  /** Averages are over this time: one burst of a second is no load. */
  meanMs: number;
  /** The trend is a line through this much history. */
  trendMs: number;
  /** In which a backlog shall be worked off. */
  drainMs: number;
  upCoolMs: number;
  calmMs: number;
  idleMs: number;
  stepUpMin: number;
  /** Square roots of the demand that are provided for besides it. */
  spareUp: number;
  spareDown: number;
};

export const scaleLimits: ScaleLimits = {
  sampleAgeMaxMs: 60_000,
  meanMs: 60_000,
  trendMs: 120_000,
  drainMs: 120_000,
  upCoolMs: 30_000,
  calmMs: 600_000,
  idleMs: 600_000,
  stepUpMin: 2,
  spareUp: 1,
  spareDown: 3.5,
};

/** History older than this is of no use to `autoscale`: callers may drop it. */
export const HISTORY_MS = scaleLimits.calmMs + 2 * scaleLimits.meanMs;
/** A latency over its target or a flow asks for at most this many times what it was measured with. */
const FACTOR_MAX = 2;
/** Fewer requests that left say nothing about how long one takes. */
const LEFT_MIN = 8;
/** Most bursts end before what they seemed to become. */
const TREND_FACTOR_MAX = 1.5;
/** A queue that has come down to this share of what it was is being worked off. */
const FALLING_SHARE = 0.9;
const TREND_SAMPLES_MIN = 8;
/** Rises of constant traffic exceed two square roots of the level every few minutes, four in none of the traces. */
const TREND_NOISE = 4;
/** Below this share of its sequences a replica is not slow for want of replicas. */
const LOADED_SHARE = 0.5;
/** Look again so often even if nothing is due. */
const HEARTBEAT_MS = 15_000;

export type ScaleState = {
  target: number;
  grownMs: number;
  shrunkMs: number | undefined;
  idleSinceMs: number | undefined;
};

/** After a start or a take-over: as if it had just grown. */
export function freshState(target: number, nowMs: number): ScaleState {
  return { target, grownMs: nowMs, shrunkMs: undefined, idleSinceMs: undefined };
}

export type ScaleCode =
  | "steady"
  | "bounds"
  | "no-load-seen"
  | "wake"
  | "idle"
  | "queue"
  | "concurrency"
  | "throughput"
  | "trend"
  | "ttft"
  | "itl"
  | "at-max"
  | "cooling"
  | "calming"
  | "low";

export type ScaleDecision = {
  targetReplicas: number;
  /** `wanted`: what the load asks for before bounds, steps and cool-downs. */
  reason: { code: ScaleCode; text: string; wanted: number };
  state: ScaleState;
  wakeMs: number;
};

export type ScaleQuestion = { nowMs: number; history: readonly LoadSample[]; policy: ScalePolicy; state: ScaleState };

/** `history` ascending in time. */
export function autoscale(question: ScaleQuestion, limits: ScaleLimits = scaleLimits): ScaleDecision {
  const { nowMs, policy, state } = question;
  const inBounds = Math.min(policy.max, Math.max(policy.min, state.target));
  if (inBounds !== state.target) {
    return changed(question, inBounds, {
      code: "bounds",
      text: `min ${policy.min}, max ${policy.max}`,
      wanted: inBounds,
    });
  }
  const last = question.history.at(-1);
  if (last === undefined || nowMs - last.atMs > limits.sampleAgeMaxMs) {
    const text =
      last === undefined ? "no load has been measured" : `the last measurement is ${seconds(nowMs - last.atMs)} old`;
    return kept(question, { code: "no-load-seen", text, wanted: state.target }, { ...state, idleSinceMs: undefined });
  }
  if (state.target === 0) return asleep(question, last);
  const idle = last.queue === 0 && last.running === 0 && last.arrivals === 0;
  const idleSinceMs = idle ? (state.idleSinceMs ?? nowMs) : undefined;
  const known = { ...question, state: { ...state, idleSinceMs } };
  if (policy.min === 0 && idleSinceMs !== undefined && nowMs - idleSinceMs >= limits.idleMs) {
    return changed(known, 0, {
      code: "idle",
      text: `nothing was asked for during ${seconds(nowMs - idleSinceMs)}`,
      wanted: 0,
    });
  }
  const wishes = wishesOf(known, limits, limits.spareUp);
  const [most] = wishes;
  if (most !== undefined && most.wanted > state.target) return grow(known, most, limits);
  return shrink(known, limits);
}

function asleep(question: ScaleQuestion, last: LoadSample): ScaleDecision {
  const { policy, state } = question;
  if (last.queue === 0 && last.arrivals === 0) {
    return kept(question, { code: "idle", text: "asleep; the next request wakes it", wanted: 0 }, state);
  }
  const wanted = Math.max(1, Math.ceil(last.queue / policy.concurrency));
  const text = `${last.queue} requests wait and nothing serves; the first serves in about ${seconds(policy.startMs)}`;
  return changed(question, Math.min(policy.max, wanted), { code: "wake", text, wanted });
}

type Wish = ScaleDecision["reason"];

/** What each signal asks for, the most demanding first. */
function wishesOf({ history, nowMs, policy, state }: ScaleQuestion, limits: ScaleLimits, spare: number): Wish[] {
  const load = measure(history, nowMs, limits);
  const { serving, queue, demand } = load;
  const provide = (mean: number): number => (mean + spare * Math.sqrt(mean)) / policy.concurrency;
  const wishes: Wish[] = [];
  const ask = (code: ScaleCode, wanted: number, text: string): void => {
    wishes.push({ code, wanted: Math.ceil(wanted - 1e-9), text });
  };
  ask("concurrency", provide(demand), `${demand.toFixed(1)} sequences at once, a replica runs ${policy.concurrency}`);
  if (policy.tokensPerSecond !== undefined) {
    const share = load.tokensPerSecond / policy.tokensPerSecond;
    const text = `${load.tokensPerSecond.toFixed(0)} tokens/s, one replica gives ${policy.tokensPerSecond.toFixed(0)}`;
    ask("throughput", provide(share * policy.concurrency), text);
  }
  const rise = risePerMs(history, nowMs - limits.trendMs) * policy.startMs;
  const ahead = Math.min(demand + rise, demand * TREND_FACTOR_MAX);
  if (ahead > demand && queue === 0) {
    ask("trend", provide(ahead), `${ahead.toFixed(1)} sequences are expected when a new replica would serve`);
  }
  if (!load.isSettled(state.target)) return wishes.toSorted((one, other) => other.wanted - one.wanted);
  const { targets } = policy;
  if (targets.queue !== undefined && queue > targets.queue * serving) {
    const text = `${queue.toFixed(1)} requests wait for ${serving} replicas`;
    ask("queue", Math.max(serving + 1, demand / policy.concurrency), text);
  }
  const isLoaded = queue > 0 || demand > serving * policy.concurrency * LOADED_SHARE;
  for (const code of ["ttft", "itl"] as const) {
    const target = targets[`${code}Ms`];
    const value = load[`${code}Ms`];
    if (target === undefined || value <= target || !isLoaded) continue;
    const text = `${code.toUpperCase()} is ${value.toFixed(0)} ms, the target is ${target} ms`;
    ask(code, Math.max(serving + 1, serving * Math.min(FACTOR_MAX, value / target)), text);
  }
  return wishes.toSorted((one, other) => other.wanted - one.wanted);
}

type Measured = {
  serving: number;
  queue: number;
  /** Sequences at once that the arrivals need. */
  demand: number;
  tokensPerSecond: number;
  ttftMs: number;
  itlMs: number;
  /** Whether all of it was measured with `target` replicas and no backlog is being worked off: else waits are old news. */
  isSettled: (target: number) => boolean;
};

/**
 * Averages over `meanMs`. Where nothing waits the demand is what runs. Where requests wait, what runs is only what there is
 * room for: demand is then arrivals x service time (Little's law, the time taken from what left), and the backlog counts by
 * the share of it that runs at once when it is worked off in `drainMs`. Counting all of it would triple a deployment that
 * has grown already and whose replicas are starting.
 */
function measure(history: readonly LoadSample[], nowMs: number, limits: ScaleLimits): Measured {
  const recent = history.filter(({ atMs }) => atMs > nowMs - limits.meanMs);
  const samples = recent.length > 0 ? recent : history.slice(-1);
  const first = samples[0];
  const last = samples.at(-1);
  const meanOf = (values: readonly number[]): number =>
    values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
  const queue = Math.max(last?.queue ?? 0, 0) === 0 ? 0 : meanOf(samples.map((sample) => sample.queue));
  const running = meanOf(samples.map((sample) => sample.running));
  let demand = running + queue;
  if (queue > 0 && first !== undefined && last !== undefined && last.atMs > first.atMs) {
    const arrived = samples.slice(1).reduce((sum, sample) => sum + sample.arrivals, 0);
    const left = arrived - (last.queue + last.running - first.queue - first.running);
    if (left >= LEFT_MIN) {
      const serviceMs = (running * (last.atMs - first.atMs)) / left;
      const flow = running * Math.min(FACTOR_MAX, Math.max(1, arrived / left));
      demand = Math.min(demand, flow + queue * Math.min(1, serviceMs / limits.drainMs));
    }
  }
  return {
    serving: last?.serving ?? 0,
    queue,
    demand,
    tokensPerSecond: meanOf(samples.map((sample) => sample.tokensPerSecond)),
    ttftMs: meanOf(samples.flatMap((sample) => sample.ttftMs ?? [])),
    itlMs: meanOf(samples.flatMap((sample) => sample.itlMs ?? [])),
    isSettled: (target) => samples.every(({ serving }) => serving >= target) && !isFalling(samples),
  };
}

function isFalling(samples: readonly LoadSample[]): boolean {
  const [first] = samples;
  const last = samples.at(-1);
  return first !== undefined && last !== undefined && last.queue < first.queue * FALLING_SHARE;
}

/**
 * How fast the sequences become more, by least squares, per millisecond. 0 where there is too little history, and for a rise
 * within a few square roots of the level: independent arrivals vary that much without any trend.
 */
function risePerMs(history: readonly LoadSample[], sinceMs: number): number {
  const samples = history.filter(({ atMs }) => atMs > sinceMs);
  const first = samples[0];
  const last = samples.at(-1);
  if (first === undefined || last === undefined || samples.length < TREND_SAMPLES_MIN) return 0;
  const spanMs = last.atMs - first.atMs;
  if (spanMs < (last.atMs - sinceMs) / 2) return 0;
  const at = samples.reduce((sum, { atMs }) => sum + atMs, 0) / samples.length;
  const level = samples.reduce((sum, sample) => sum + sample.queue + sample.running, 0) / samples.length;
  let over = 0;
  let under = 0;
  for (const sample of samples) {
    over += (sample.atMs - at) * (sample.queue + sample.running - level);
    under += (sample.atMs - at) ** 2;
  }
  const slope = over / under;
  return slope * spanMs > TREND_NOISE * Math.sqrt(level) ? slope : 0;
}

function grow(question: ScaleQuestion, wish: Wish, limits: ScaleLimits): ScaleDecision {
  const { nowMs, policy, state } = question;
  if (state.target >= policy.max) {
    return kept(question, { ...wish, code: "at-max", text: `${wish.text}; max is ${policy.max}` }, state);
  }
  const openMs = state.grownMs + limits.upCoolMs;
  if (nowMs < openMs) {
    const text = `${wish.text}; it grew ${seconds(nowMs - state.grownMs)} ago`;
    return kept(question, { ...wish, code: "cooling", text }, state, openMs);
  }
  const step = Math.max(state.target * 2, state.target + limits.stepUpMin);
  return changed(question, Math.min(policy.max, step, wish.wanted), wish);
}

/** The past is asked as well, one `meanMs` after the other: what any of them wanted is kept. */
function shrink(question: ScaleQuestion, limits: ScaleLimits): ScaleDecision {
  const { nowMs, history, policy, state } = question;
  const waitMs = limits.calmMs;
  let most: Wish = { code: "low", wanted: Math.max(1, policy.min), text: "no load" };
  for (let atMs = nowMs; atMs > nowMs - waitMs; atMs -= limits.meanMs) {
    const past = history.filter((sample) => sample.atMs <= atMs);
    const asked =
      past.length === 0 ? [] : wishesOf({ ...question, nowMs: atMs, history: past }, limits, limits.spareDown);
    // A trend of the past has become load by now, or it was none.
    const wish = asked.find(({ code }) => code !== "trend" || atMs === nowMs);
    if (wish !== undefined && wish.wanted > most.wanted) most = wish;
  }
  const dueMs = idleEndMs(question, limits);
  const { wanted, text } = most;
  if (wanted >= state.target) return kept(question, { code: "steady", text, wanted }, state, dueMs);
  // Of what was before the first sample nothing is known: it is waited for, as after a growth.
  const restedMs = Math.max(state.grownMs, history[0]?.atMs ?? nowMs) + waitMs;
  const openMs = Math.max(restedMs, (state.shrunkMs ?? nowMs - limits.meanMs) + limits.meanMs);
  if (nowMs < openMs) {
    const wait = `${wanted} would do; kept for another ${seconds(openMs - nowMs)}`;
    return kept(
      question,
      { code: "calming", text: `${text}: ${wait}`, wanted },
      state,
      Math.min(openMs, dueMs ?? openMs),
    );
  }
  const step = state.target - Math.max(1, Math.floor(state.target / 2));
  const next = { ...question, state: { ...state, shrunkMs: nowMs } };
  return changed(next, Math.max(wanted, step), {
    code: "low",
    text: `${text} was the most in ${seconds(waitMs)}`,
    wanted,
  });
}

function idleEndMs({ policy, state }: ScaleQuestion, limits: ScaleLimits): number | undefined {
  return policy.min === 0 && state.idleSinceMs !== undefined ? state.idleSinceMs + limits.idleMs : undefined;
}

function changed({ nowMs, state }: ScaleQuestion, target: number, reason: Wish): ScaleDecision {
  const next: ScaleState = { ...state, target, grownMs: target > state.target ? nowMs : state.grownMs };
  return { targetReplicas: target, reason, state: next, wakeMs: nowMs + HEARTBEAT_MS };
}

function kept(
  { nowMs }: ScaleQuestion,
  reason: Wish,
  state: ScaleState,
  dueMs = Number.POSITIVE_INFINITY,
): ScaleDecision {
  const wakeMs = Math.max(nowMs + 1, Math.min(nowMs + HEARTBEAT_MS, dueMs));
  return { targetReplicas: state.target, reason, state, wakeMs };
}

function seconds(ms: number): string {
  return `${Math.round(ms / 1000)} s`;
}
