// How an API server behind a proxy may be: chances of each fault for each request or each piece of a watch, from 0 to 1.
export type Mood =
  | "unreachable"
  | "tooMany"
  | "unavailable"
  | "internal"
  | "conflict"
  | "loseReply"
  | "slow"
  | "watchBreak"
  | "watchGone";
/** Latencies are drawn evenly from [least, most]; `slow` requests take `slowMs`, the others `latencyMs`. */
export type Moods = Readonly<Record<Mood, number>> & {
  slowMs: readonly [number, number];
  latencyMs: readonly [number, number];
};

export const calm: Moods = {
  unreachable: 0,
  tooMany: 0,
  unavailable: 0,
  internal: 0,
  conflict: 0,
  loseReply: 0,
  slow: 0,
  watchBreak: 0,
  watchGone: 0,
  slowMs: [0, 0],
  latencyMs: [0, 0],
};
