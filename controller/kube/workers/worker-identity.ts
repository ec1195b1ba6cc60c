// Whether an answer came from the worker that was asked. A pod's address may be another pod's by now, and a worker of
// another group has incarnations and indexes of the same numbers: only the pod's UID tells them apart. Pure.
import type { WorkerDescription } from "../../../proto/gen/muster/v1/worker.ts";
import type { DescribeAnswer, WorkerTarget } from "./worker-link.ts";

export type Identified = { kind: "described"; description: WorkerDescription } | { kind: "refused"; detail: string };

/** An answer of anybody else counts as silence, with the reason. */
export function identify(target: WorkerTarget, answer: DescribeAnswer): Identified {
  if (answer.kind === "silent") return { kind: "refused", detail: answer.detail };
  const { uid, description } = answer;
  const refuse = (detail: string): Identified => ({ kind: "refused", detail: `${target.address} ${detail}` });
  if (uid === undefined) return refuse("does not say which pod it is");
  if (uid !== target.uid) return refuse(`is pod ${uid}, not ${target.uid}: the address belongs to another pod now`);
  const { incarnation, worker } = target.name;
  if (description.incarnation !== incarnation || description.worker !== worker) {
    return refuse(
      `says that it is worker ${description.worker} of incarnation ${description.incarnation}, not ${worker} of ${incarnation}`,
    );
  }
  return { kind: "described", description };
}
