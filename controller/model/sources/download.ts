// One file over HTTP into the cache: resumable, checked, atomic.
//
//   D1  a part is continued only with bytes of the same identity (etag); anything else is refused, never appended.
//   D2  the final name appears only when the length is right, and the sha256 where the server names one.
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { type FileHandle, open, rename, rm, stat, truncate } from "node:fs/promises";
import { FaultError, transient } from "../../../proto/fault.ts";
import { reject } from "../reject.ts";
import { Blobs } from "./blobs.ts";
import { type Answer, backOff, get, type HttpOptions, Interrupted, TRIES_MAX, withoutQuery } from "./http.ts";
import { changed, identityOf, type RemoteFile, rangeOf, refuse } from "./remote-file.ts";

export type Transfer = HttpOptions & {
  /** Bytes of the file that are there now. */
  onBytes?: (bytes: number) => void;
};

/** Answers the path of the complete file; transfers only what is missing. */
export async function download(file: RemoteFile, blobs: Blobs, transfer: Transfer): Promise<string> {
  const key = Blobs.keyOf(file);
  // Another process of this machine may be at it: its progress is ours.
  const onWait = async () => transfer.onBytes?.(await sizeOf(`${blobs.path(key)}.part`));
  return blobs.locked(key, { signal: transfer.signal, onWait }, async () => {
    const there = await blobs.find(key, file.size);
    if (there) return there;
    const path = blobs.path(key);
    const part = `${path}.part`;
    await blobs.pin(key);
    await transferAll(file, part, transfer);
    await checkContent(file, part);
    await rename(part, path);
    return path;
  });
}

const sizeOf = async (path: string): Promise<number> => (await stat(path).catch(() => undefined))?.size ?? 0;

/** Tries end when several in a row brought nothing. */
async function transferAll(file: RemoteFile, part: string, transfer: Transfer): Promise<void> {
  if ((await sizeOf(part)) > file.size || file.etag === "") await rm(part, { force: true });
  for (let failures = 0; ; ) {
    const before = await sizeOf(part);
    if (before === file.size && before > 0) return;
    try {
      await transferOnce(file, part, transfer);
      return;
    } catch (fault) {
      if (!(fault instanceof Interrupted)) throw fault;
      failures = (await sizeOf(part)) > before ? 1 : failures + 1;
      if (failures >= TRIES_MAX) {
        const detail = `${withoutQuery(file.url)}: ${fault.message}, ${TRIES_MAX} tries without progress; what is there will be continued`;
        throw new FaultError(transient("source_unreachable", detail, file.name), { cause: fault });
      }
      await backOff(failures, null, transfer.signal);
    }
  }
}

async function transferOnce(file: RemoteFile, part: string, transfer: Transfer): Promise<void> {
  const have = file.hasRanges && file.etag !== "" ? await sizeOf(part) : 0;
  const condition = file.validator ? { "if-range": file.validator } : {};
  const answer = await get(file.url, have > 0 ? { range: `bytes=${have}-`, ...condition } : {}, transfer);
  if (answer.status !== 200 && answer.status !== 206) {
    await answer.discard();
    refuse(file.name, answer, transfer);
    reject(file.name, "is not there any more");
  }
  if (identityOf(answer) !== file.etag) {
    await answer.discard();
    throw changed(file, identityOf(answer));
  }
  const begin = answer.status === 206 ? rangeOf(answer, file.name).begin : 0;
  if (begin !== have && begin !== 0) {
    await answer.discard();
    reject(file.name, `asked for bytes from ${have}, got them from ${begin}`);
  }
  await append({ file, part, begin }, answer, transfer);
}

type Target = { file: RemoteFile; part: string; begin: number };

async function append({ file, part, begin }: Target, answer: Answer, transfer: Transfer): Promise<void> {
  const handle = await open(part, "a");
  try {
    await truncate(part, begin);
    let position = begin;
    transfer.onBytes?.(position);
    for await (const piece of answer.body()) {
      if (position + piece.length > file.size)
        reject(file.name, `the server sends more than the ${file.size} bytes it announced`, file.size);
      await writeAll(handle, piece);
      position += piece.length;
      transfer.onBytes?.(position);
    }
    if (position < file.size) throw new Interrupted(`the body ended at byte ${position} of ${file.size}`);
    await handle.sync();
  } finally {
    await handle.close();
  }
}

async function writeAll(handle: FileHandle, piece: Uint8Array): Promise<void> {
  for (let done = 0; done < piece.length; ) done += (await handle.write(piece, done)).bytesWritten;
}

/** D2. */
async function checkContent(file: RemoteFile, part: string): Promise<void> {
  const size = await sizeOf(part);
  if (size !== file.size) reject(file.name, `has ${size} bytes after the download, not ${file.size}`);
  if (!/^[0-9a-f]{64}$/.test(file.etag)) return;
  const hash = createHash("sha256");
  for await (const piece of createReadStream(part)) hash.update(piece);
  const digest = hash.digest("hex");
  if (digest === file.etag) return;
  await rm(part, { force: true });
  const detail = `the content's sha256 is ${digest}, the server named ${file.etag}; it was thrown away, start again`;
  throw new FaultError(transient("corrupt_download", detail, file.name));
}
