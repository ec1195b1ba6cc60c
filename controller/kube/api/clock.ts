// Time as this machine has it, for whatever takes a Clock. Monotonic: a step of the wall clock neither ends a lease nor
// holds back a retry.
import type { Clock } from "../../reconcile/run.ts";

export type { Clock } from "../../reconcile/run.ts";

/** Longest wait of one timer; Node turns longer ones into 1 ms. */
const TIMER_MS_MAX = 2 ** 31 - 1;

export const systemClock: Clock = {
  nowMs: () => performance.timeOrigin + performance.now(),
  sleep: async (signal, untilMs) => {
    while (!signal.aborted && systemClock.nowMs() < untilMs) {
      const waitMs = Math.min(TIMER_MS_MAX, Math.max(0, untilMs - systemClock.nowMs()));
      const { promise, resolve } = Promise.withResolvers<void>();
      const timer = setTimeout(resolve, waitMs);
      const wake = () => resolve();
      signal.addEventListener("abort", wake, { once: true });
      await promise;
      clearTimeout(timer);
      signal.removeEventListener("abort", wake);
    }
  },
};
