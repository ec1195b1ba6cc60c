// Every bound of the reconciler, with its reason.

export type ReconcileLimits = {
  /** Wait before the incarnation after the first failure; doubles with each further one. */
  backoffBaseMs: number;
  backoffMaxMs: number;
  /** This many failures within the window: stop trying, a person has to look. */
  failuresMax: number;
  failuresWindowMs: number;
  /** Serving this long forgets earlier failures. */
  stableMs: number;
  /** A worker that spoke once and is silent this long is lost. Above the engine's own give-up: a starved core is no death. */
  silentMs: number;
  /** A worker that has never spoken this long after its start is lost. */
  startMs: number;
  /** Nothing moves (bytes, phases) this long before serving: the incarnation ends. */
  stallMs: number;
  /** For the survivors of an ended incarnation: their streams are lost already, only tidying is left. */
  endGraceMs: number;
  /** For an incarnation that gives way to another plan. */
  drainMs: number;
  /** Look again even if nobody calls. */
  heartbeatMs: number;
};

export const defaultLimits: ReconcileLimits = {
  backoffBaseMs: 200,
  backoffMaxMs: 10_000,
  failuresMax: 10,
  failuresWindowMs: 300_000,
  stableMs: 60_000,
  silentMs: 15_000,
  startMs: 60_000,
  stallMs: 120_000,
  endGraceMs: 1_000,
  drainMs: 30_000,
  heartbeatMs: 5_000,
};
