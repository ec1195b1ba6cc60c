// The time of a simulation or of the machine, for the parts of the simulated cluster that act by themselves.
import { type Clock, systemClock } from "../../controller/kube/api/clock.ts";

export type VirtualTime = Clock & {
  /** Runs it then; answers how to cancel. */
  at(atMs: number, run: () => void): () => void;
};

/** Timers of this machine; they keep no process alive. */
export const realTime: VirtualTime = {
  ...systemClock,
  at: (atMs, run) => {
    const timer = setTimeout(run, Math.max(0, atMs - systemClock.nowMs()));
    timer.unref();
    return () => clearTimeout(timer);
  },
};
