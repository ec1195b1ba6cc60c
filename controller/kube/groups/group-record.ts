// What the reconciler must remember of a group (GroupRecord), kept in the status of its ReplicaGroup. Owns the form; pure.
import { type Parsed, parseReplicaGroup, type ReplicaGroup } from "../../api/parse.ts";
import { freshRecord, type GroupRecord } from "../../reconcile/cluster.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf } from "../api/fields.ts";

/** As the CRD has it: longer texts and lists would be refused. */
const DETAIL_MAX = 1024;
const FAILURES_MAX = 32;

const known = new WeakMap<KubeObject, Parsed<ReplicaGroup>>();

/** Read once for each object, whoever asks: objects are never changed in place (A2 of client.ts). */
export function parsedGroupOf(object: KubeObject): Parsed<ReplicaGroup> {
  const parsed = known.get(object) ?? parseReplicaGroup(object);
  known.set(object, parsed);
  return parsed;
}

/** Throws where the object is no ReplicaGroup that can be read: nobody decides on a guess (C3). */
export function groupOf(object: KubeObject): ReplicaGroup {
  const parsed = parsedGroupOf(object);
  if (parsed.kind === "ok") return parsed.value;
  const { namespace, name } = object.metadata;
  throw new Error(`ReplicaGroup ${namespace}/${name}: ${parsed.fault.field}: ${parsed.fault.detail}`);
}

export function recordOf(group: ReplicaGroup): GroupRecord {
  const stored = group.status?.record;
  if (stored === undefined) return freshRecord();
  return {
    incarnation: BigInt(stored.incarnation),
    revision: stored.revision,
    begun: stored.begun,
    failures: stored.failures.map(({ at, detail, isFinal }) => ({ atMs: Date.parse(at), detail, isFinal })),
    notBeforeMs: stored.notBefore === undefined ? 0 : Date.parse(stored.notBefore),
    restarts: stored.restarts,
    failedNodes: Object.fromEntries((stored.failedNodes ?? []).map(({ node, times }) => [node, times])),
  };
}

/** The status with this record in it; everything else stays. */
export function withRecord(status: unknown, record: GroupRecord): unknown {
  const { incarnation, revision, begun, failures, notBeforeMs, restarts } = record;
  const failedNodes = Object.entries(record.failedNodes).map(([node, times]) => ({ node, times }));
  return {
    ...fieldsOf(status),
    record: {
      incarnation: Number(incarnation),
      revision,
      begun,
      failures: failures.slice(-FAILURES_MAX).map(({ atMs, detail, isFinal }) => ({
        at: momentOf(atMs),
        detail: detail.slice(0, DETAIL_MAX),
        isFinal,
      })),
      ...(notBeforeMs > 0 ? { notBefore: momentOf(notBeforeMs) } : {}),
      restarts,
      ...(failedNodes.length > 0 ? { failedNodes } : {}),
    },
  };
}

/** Milliseconds up to the next whole one: a back-off is never cut short by rounding. */
const momentOf = (ms: number): string => new Date(Math.ceil(ms)).toISOString();
