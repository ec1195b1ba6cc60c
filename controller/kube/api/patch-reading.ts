// A pod patch as it comes from a deployment's spec: read against the allow-list of controller/api, every refusal by its field.
// The API server has checked it already; this reads what an older CRD let through, and what a file for `--what-if` says.
import { invalid } from "../../../proto/fault.ts";
import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import { type PodPatch, podPatch } from "../../api/pod-patch.ts";

export type PatchReading = { kind: "ok"; patch: PodPatch } | { kind: "refused"; faults: readonly Fault[] };

const ALLOWED = Object.keys(podPatch.shape).join(", ");

export function readPatch(value: unknown): PatchReading {
  const read = podPatch.safeParse(value);
  if (read.success) return { kind: "ok", patch: read.data };
  const faults = read.error.issues.flatMap((issue): Fault[] => {
    const path = ["podPatch", ...issue.path.map(String)].join(".");
    if (issue.code !== "unrecognized_keys") return [invalid(path, issue.message)];
    const allowed =
      issue.path.length === 0 ? `podPatch takes ${ALLOWED}` : "it is not among the fields that may be set";
    return issue.keys.map((key) => invalid(`${path}.${key}`, `remove it: ${allowed}`, "not_allowed"));
  });
  return { kind: "refused", faults };
}
