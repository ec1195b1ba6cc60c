// Writes the record of a group (group-record.ts), and finds out what became of a write without an answer.
import { isDeepStrictEqual } from "node:util";
import type { GroupRecord } from "../../reconcile/cluster.ts";
import { isConflict, isTransient, type KubeApi, KubeError, type KubeObject } from "../api/client.ts";
import { replicaGroups } from "../api/resources.ts";
import { withRecord } from "../groups/group-record.ts";
import type { Store } from "../watch/store.ts";

export type RecordDesk = { api: KubeApi; groups: Store; signal: AbortSignal };

/** `object`: as it was decided on. Throws where it is not written; the next look shows what is (C4 of reconcile/cluster.ts). */
export async function writeRecord(desk: RecordDesk, object: KubeObject, record: GroupRecord): Promise<void> {
  const { api, groups, signal } = desk;
  const status = withRecord(object.status, record);
  try {
    groups.learn(await api.replaceStatus(replicaGroups, { ...object, status }, signal));
  } catch (error) {
    if (signal.aborted || !(isConflict(error) || isTransient(error))) throw error;
    // A write without an answer may have happened (A4 of client.ts): the server knows.
    const live = await relearn(desk, object);
    const isWritten = live !== undefined && isDeepStrictEqual(withRecord(live.status, record), live.status);
    if (!isWritten) throw error;
  }
}

/** Whoever has written meanwhile: the next look shall see it. Where even that fails the watch will tell. */
async function relearn({ api, groups, signal }: RecordDesk, { metadata }: KubeObject): Promise<KubeObject | undefined> {
  try {
    const live = await api.get(replicaGroups, metadata.name, metadata.namespace, signal);
    if (live !== undefined) groups.learn(live);
    return live;
  } catch (error) {
    if (!(error instanceof KubeError)) throw error;
    return undefined;
  }
}
