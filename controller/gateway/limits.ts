// The gateway's bounds: every one is a named number with its reason, and hitting one is a typed fault (STYLE R17).

/** Largest request body: about 2 million tokens of text, twice the longest context planned for. */
export const BODY_BYTES_MAX = 8 * 1024 * 1024;
/** Choices of one request, prompts times n: what one client may occupy of a leader's queue at once. */
export const CHOICES_MAX = 128;
export const N_MAX = 16;
export const STOPS_MAX = 16;
/** UTF-16 units of one stop string, as leaders allow: they withhold as much text while it could still match. */
export const STOP_UNITS_MAX = 256;
export const TOP_LOGPROBS_MAX = 20;
export const LOGIT_BIAS_MAX = 1024;
export const MESSAGES_MAX = 4096;
/** Leaders that took a stream over before it is given up: a request that kills every leader must end. */
export const RESUMES_MAX = 16;
/** Time to receive a whole request: slower clients are cut. */
export const REQUEST_RECEIVE_MS = 60_000;
export const CONNECTIONS_MAX = 8192;
/** UTF-16 units of the cause that a held stream is told in one comment. */
export const WAITING_UNITS_MAX = 200;
/** Seconds a client is told to wait after a full queue, and after a model that is down. */
export const RETRY_AFTER_QUEUE_S = 1;
export const RETRY_AFTER_DOWN_S = 5;

/** Bounds a deployment may change; tests shorten them. */
export type GatewayLimits = {
  /** How long a stream is held while its model has no leader. */
  holdMs: number;
  /** How long a request waits for a model that comes up from zero: nodes may have to be bought, weights to be pulled. */
  wakeMs: number;
  /** Between two `: waiting` comments of a held stream. */
  waitingMs: number;
  /** Requests being answered at once, held ones included. */
  openRequestsMax: number;
  /** Prompt bytes of all requests being answered: they are kept for going on after a death. */
  openBytesMax: number;
  /** A client that does not read for so long is dropped. */
  stallMs: number;
  /** Unsent bytes of one client's socket before it is dropped. */
  socketBytesMax: number;
  /** How long running streams may go on after the order to stop. */
  drainMs: number;
};

export const defaultLimits: GatewayLimits = {
  holdMs: 60_000,
  wakeMs: 600_000,
  waitingMs: 2_000,
  openRequestsMax: 1024,
  openBytesMax: 512 * 1024 * 1024,
  stallMs: 30_000,
  socketBytesMax: 1024 * 1024,
  drainMs: 30_000,
};
