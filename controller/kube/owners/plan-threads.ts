// Threads in which the planner answers: headers may come over a slow network, and thousands of cuts take a while. Owns how long
// a thread lives: it answers one question at a time and stays for the next ones, because starting one costs more than most
// answers do; one whose question is given up is ended.
import { Worker } from "node:worker_threads";
import type { Planning } from "../../reconcile/deployment/planning.ts";
import type { Planner } from "./plan-desk.ts";

/** A thread that plans for 40,000 GPUs needs about a tenth of it. */
const HEAP_MB_MAX = 2_048;
/** Bursts of questions come when deployments do; after them nobody asks for an hour. */
const IDLE_MS = 10_000;
/** The others of a burst are ended with their answer. */
const IDLE_MAX = 1;

type Idle = { thread: Worker; end: NodeJS.Timeout; forget: () => void };

const idle: Idle[] = [];

/** Rejects where the thread dies or the signal aborts. */
export const threadPlanner: Planner = async (ask, signal) => {
  signal.throwIfAborted();
  const thread = takeThread();
  const { promise, resolve, reject } = Promise.withResolvers<Planning>();
  const onAbort = () => reject(signal.reason);
  const onExit = (code: number) => reject(new Error(`the planning thread ended with code ${code} and no answer`));
  signal.addEventListener("abort", onAbort, { once: true });
  thread.once("message", resolve).once("error", reject).once("exit", onExit);
  thread.ref();
  thread.postMessage(ask);
  try {
    const planning = await promise;
    thread.off("error", reject).off("exit", onExit);
    await keepThread(thread);
    return planning;
  } catch (error) {
    await thread.terminate();
    throw error;
  } finally {
    signal.removeEventListener("abort", onAbort);
  }
};

function takeThread(): Worker {
  const kept = idle.pop();
  if (kept !== undefined) {
    clearTimeout(kept.end);
    kept.thread.off("error", kept.forget).off("exit", kept.forget);
    return kept.thread;
  }
  return new Worker(new URL("./plan-thread.ts", import.meta.url), {
    // Flags of the process are about how it was started.
    execArgv: [],
    resourceLimits: { maxOldGenerationSizeMb: HEAP_MB_MAX },
  });
}

/** It does not keep the process alive. */
async function keepThread(thread: Worker): Promise<void> {
  if (idle.length >= IDLE_MAX) {
    await thread.terminate();
    return;
  }
  const forget = () => {
    const at = idle.findIndex((each) => each.thread === thread);
    const [gone] = at < 0 ? [] : idle.splice(at, 1);
    clearTimeout(gone?.end);
  };
  const end = setTimeout(() => {
    forget();
    void thread.terminate();
  }, IDLE_MS);
  end.unref();
  thread.unref();
  // One that dies while nobody waits for it is no longer there to be taken.
  thread.once("error", forget).once("exit", forget);
  idle.push({ thread, end, forget });
}
