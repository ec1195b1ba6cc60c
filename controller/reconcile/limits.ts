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
  /** Nothing moves (bytes, phases) this long before serving: the incarnation ends. By what it does meanwhile. */
  stall: {
    /** Until all workers answer and have taken their Load. */
    startMs: number;
    /** Files come from elsewhere: their source may have to be woken, or throttles. */
    pullMs: number;
    /** Bytes come from a disk or a page cache. */
    loadMs: number;
    connectMs: number;
    /** First steps; a GPU captures its graphs without a word between. */
    warmMs: number;
  };
  /**
   * A step that a rank does not finish while work is pending, where one is behind or does not answer: the incarnation ends,
   * and the rank is named. With a second until the last movement is reported and one for an answer that does not come this
   * is within 5 s.
   */
  stepMs: number;
  /** A leader that serves says something every second; this long without a word it is asked whether it lives. */
  quietMs: number;
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
  stall: { startMs: 120_000, pullMs: 1_800_000, loadMs: 120_000, connectMs: 120_000, warmMs: 600_000 },
  stepMs: 2_500,
  quietMs: 2_500,
  endGraceMs: 1_000,
  drainMs: 30_000,
  heartbeatMs: 5_000,
};
