// One question to the planner in a thread of its own: headers may come over a slow network, and thousands of cuts take a
// while. Its owner ends it when it takes too long. Started by plan-desk.ts alone.
import { parentPort, workerData } from "node:worker_threads";
import { type Ask, planQuestion } from "../reconcile/deployment/planning.ts";

const ask: Ask = workerData;
parentPort?.postMessage(await planQuestion(ask));
