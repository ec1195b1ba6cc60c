// Questions to the planner in a thread of its own, one after the other. Its owner ends it when one takes too long. Started by
// plan-threads.ts alone.
import { parentPort } from "node:worker_threads";
import { type Ask, planQuestion } from "../../reconcile/deployment/planning.ts";

parentPort?.on("message", async (ask: Ask) => parentPort?.postMessage(await planQuestion(ask)));
