// The downloaded files on disk. Owns names, references, pins, locks and room; the transfer itself is download.ts.
//
//   B1  a complete blob has its final name; what is being written ends in ".part", beside a ".lock" that its writer keeps fresh.
//   B2  room is made before a transfer: oldest unused complete blobs go first, never pinned ones or those of the same model.
//   B3  a pin belongs to a process; a dead process holds none. Whether one of another host (pods share a cache) still lives is
//       not known here: it holds its pin for PIN_OLD_MS.

import { mkdir, open, readdir, readFile, rm, stat, statfs, utimes, writeFile } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { FaultError, transient } from "../../../proto/fault.ts";
import { sha256, writeAtomically } from "../cache.ts";
import { parseJsonObject } from "../json.ts";
import { Keys } from "../keys.ts";
import { reject } from "../reject.ts";
import { cancelled } from "./http.ts";
import type { RemoteFile } from "./remote-file.ts";

/** Enough for one large model; MUSTER_CACHE_BYTES_MAX and the option change it. */
export const CACHE_BYTES_DEFAULT = 1024 ** 4;
const LOCK_FRESH_MS = 60_000;
const LOCK_TOUCH_MS = 5_000;
const LOCK_POLL_MS = 200;
/** A part nobody has written to for so long may go. */
const PART_OLD_MS = 7 * 24 * 3600 * 1000;
/** Longer than any load that began with the pin. */
const PIN_OLD_MS = 24 * 3600 * 1000;
const REFERENCE_BYTES_MAX = 64 * 1024;

export type Reference = { key: string; name: string; size: number; etag: string };
export type Room = { bytesMax: number };

export class Blobs {
  readonly root: string;
  readonly #folder: string;
  readonly #bytesMax: number;

  constructor(root: string, room: Room) {
    this.root = root;
    this.#folder = join(root, "blobs");
    this.#bytesMax = room.bytesMax;
  }

  /** Content-addressed: by the sha256 that the server names, else by URL and etag; without an etag by URL and size. */
  static keyOf(file: RemoteFile): string {
    if (/^[0-9a-f]{64}$/.test(file.etag)) return file.etag;
    return sha256(`${file.url.href}\n${file.etag}\n${file.size}`).replace(/^../, "u-");
  }

  path(key: string): string {
    return join(this.#folder, key);
  }

  /** The path of a complete blob; marks it as used now and pins it for this process. */
  async find(key: string, size: number): Promise<string | undefined> {
    const path = this.path(key);
    const found = await stat(path).catch(() => undefined);
    if (!found || found.size !== size) return undefined;
    const now = new Date();
    await utimes(path, now, now);
    await this.pin(key);
    return path;
  }

  async pin(key: string): Promise<void> {
    await mkdir(this.#folder, { recursive: true });
    await writeFile(`${this.path(key)}.pin-${process.pid}@${hostname()}`, "");
  }

  async remember(address: string, reference: Reference): Promise<void> {
    await mkdir(join(this.root, "refs"), { recursive: true });
    await writeAtomically(this.#reference(address), JSON.stringify({ address, ...reference }));
  }

  async recall(address: string): Promise<Reference | undefined> {
    const path = this.#reference(address);
    const found = await stat(path).catch(() => undefined);
    if (!found || found.size > REFERENCE_BYTES_MAX) return undefined;
    const keys = new Keys(path, parseJsonObject(await readFile(path), path).entries);
    const size = keys.integer("size", { min: 0, max: Number.MAX_SAFE_INTEGER });
    return { key: keys.text("key"), name: keys.text("name"), size, etag: keys.text("etag") };
  }

  #reference(address: string): string {
    return join(this.root, "refs", `${sha256(address)}.json`);
  }

  /** B2. `wanted` are the blobs about to be written or used together. */
  async makeRoom(wanted: readonly { key: string; size: number }[]): Promise<void> {
    await mkdir(this.#folder, { recursive: true });
    const total = wanted.reduce((sum, { size }) => sum + size, 0);
    if (total > this.#bytesMax) {
      const limit = `more than the cache limit of ${this.#bytesMax}; raise MUSTER_CACHE_BYTES_MAX`;
      reject("source", `the model's files have ${total} bytes, ${limit}`);
    }
    const entries = await this.#entries();
    const keep = new Set(wanted.map(({ key }) => key));
    let used = entries.filter(({ key }) => !keep.has(key)).reduce((sum, { size }) => sum + size, 0);
    for (const entry of entries.toSorted((a, b) => a.usedAt - b.usedAt)) {
      if (used + total <= this.#bytesMax) break;
      if (keep.has(entry.key) || entry.isPinned || !entry.mayGo) continue;
      await rm(join(this.#folder, entry.file), { force: true });
      used -= entry.size;
    }
    if (used + total > this.#bytesMax)
      reject(
        "source",
        `${total} bytes do not fit: ${used} of ${this.#bytesMax} in the cache are in use; raise MUSTER_CACHE_BYTES_MAX`,
      );
    await this.#checkDisk(entries, wanted);
  }

  async #checkDisk(entries: readonly Entry[], wanted: readonly { key: string; size: number }[]): Promise<void> {
    const present = new Map<string, number>();
    for (const { key, size } of entries) present.set(key, Math.max(size, present.get(key) ?? 0));
    const missing = wanted.reduce((sum, { key, size }) => sum + Math.max(0, size - (present.get(key) ?? 0)), 0);
    const disk = await statfs(this.#folder);
    const free = disk.bavail * disk.bsize;
    if (missing > free)
      reject("source", `${missing} bytes are to be downloaded, but ${this.root} has ${free} bytes free`);
  }

  async #entries(): Promise<Entry[]> {
    const names = await readdir(this.#folder);
    const pinned = new Set<string>();
    for (const name of names) {
      const [, key, pid, host = hostname()] = /^(.*)\.pin-(\d+)(?:@(.+))?$/.exec(name) ?? [];
      if (key === undefined) continue;
      const path = join(this.#folder, name);
      const isHeld = host === hostname() ? isAlive(Number(pid)) : await isYounger(path, PIN_OLD_MS);
      if (isHeld) pinned.add(key);
      else await rm(path, { force: true });
    }
    const locked = new Set<string>();
    for (const name of names)
      if (name.endsWith(".lock") && (await isFresh(join(this.#folder, name))))
        locked.add(name.slice(0, -".lock".length));
    const entries: Entry[] = [];
    for (const file of names) {
      if (/\.(lock|tmp)$|\.pin-\d+(@.+)?$/.test(file)) continue;
      const found = await stat(join(this.#folder, file)).catch(() => undefined);
      if (!found) continue;
      const isPart = file.endsWith(".part");
      const key = isPart ? file.slice(0, -".part".length) : file;
      const mayGo = !locked.has(key) && (!isPart || Date.now() - found.mtimeMs > PART_OLD_MS);
      entries.push({ file, key, size: found.size, usedAt: found.mtimeMs, isPinned: pinned.has(key), mayGo });
    }
    return entries;
  }

  /** Waits for whoever writes the same blob, then holds the lock while `work` runs. `onWait`: at every look meanwhile. */
  async locked<T>(
    key: string,
    { signal, onWait }: { signal: AbortSignal | undefined; onWait: () => Promise<void> },
    work: () => Promise<T>,
  ): Promise<T> {
    const path = `${this.path(key)}.lock`;
    await mkdir(this.#folder, { recursive: true });
    while (!(await takeLock(path))) {
      if (signal?.aborted) throw cancelled(signal.reason);
      await onWait();
      await sleep(LOCK_POLL_MS);
    }
    const touch = setInterval(() => {
      const now = new Date();
      utimes(path, now, now).catch(() => {});
    }, LOCK_TOUCH_MS);
    try {
      return await work();
    } finally {
      clearInterval(touch);
      await rm(path, { force: true });
    }
  }
}

type Entry = { file: string; key: string; size: number; usedAt: number; isPinned: boolean; mayGo: boolean };

const isFresh = (path: string): Promise<boolean> => isYounger(path, LOCK_FRESH_MS);

async function isYounger(path: string, ageMs: number): Promise<boolean> {
  const found = await stat(path).catch(() => undefined);
  return found !== undefined && Date.now() - found.mtimeMs < ageMs;
}

/** The wait is bounded by the lock's owner: it must touch the file, or the lock is taken from it. */
async function takeLock(path: string): Promise<boolean> {
  try {
    await (await open(path, "wx")).close();
    return true;
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : "";
    if (code !== "EEXIST") throw new FaultError(transient("cache", `${path}: ${code}`, "cache"), { cause });
    if (!(await isFresh(path))) await rm(path, { force: true });
    return false;
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (cause) {
    return cause instanceof Error && "code" in cause && cause.code === "EPERM";
  }
}
