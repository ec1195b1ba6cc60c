// Where files that did not come with the checkout are kept: a content-addressed directory. Owns the names in it and atomic
// writing; what is downloaded into it is sources/download.ts.
import { createHash, randomBytes } from "node:crypto";
import { mkdir, rename, rm, stat, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { join } from "node:path";

export function cacheRoot(cacheDir: string | undefined): string {
  if (cacheDir) return cacheDir;
  if (process.env.MUSTER_CACHE) return process.env.MUSTER_CACHE;
  const base = process.env.XDG_CACHE_HOME;
  return join(base && base !== "" ? base : join(homedir(), ".cache"), "muster");
}

export const sha256 = (bytes: string | Uint8Array): string => createHash("sha256").update(bytes).digest("hex");

/** Writes through a name of its own, so that a reader sees all of it or nothing. */
export async function writeAtomically(path: string, bytes: string | Uint8Array): Promise<void> {
  const temporary = `${path}.${process.pid}.${randomBytes(4).toString("hex")}.tmp`;
  try {
    await writeFile(temporary, bytes, { flag: "wx" });
    await rename(temporary, path);
  } finally {
    await rm(temporary, { force: true });
  }
}

/** Puts a small file under its content's name and answers its path; does nothing where it is there already. */
export async function keep(root: string, kind: string, content: string): Promise<string> {
  const folder = join(root, kind, sha256(content));
  const path = join(folder, "tokenizer.json");
  const found = await stat(path).catch(() => undefined);
  if (found?.size === Buffer.byteLength(content)) return path;
  await mkdir(folder, { recursive: true });
  await writeAtomically(path, content);
  return path;
}
