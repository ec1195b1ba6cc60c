// Where a local run keeps its sockets (gone with the run) and its logs (kept, the newest few).
import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";

const LOG_FOLDERS_KEPT = 10;
/** A unix socket's path has at most 107 bytes; names inside the folder need up to 40 of them. */
const FOLDER_BYTES_MAX = 67;

export type RunFolder = { path: string; control: string; logs: string };

/** Folder that holds all runs of this user, mode 0700. */
export function runsFolder(): string {
  // Not userInfo(): in a container the user may have a number and no name.
  const self = process.getuid?.();
  const own = join(tmpdir(), `muster-${self}`);
  const folder = Buffer.byteLength(own) + 8 > FOLDER_BYTES_MAX ? `/tmp/muster-${self}` : own;
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const { uid, mode } = statSync(folder);
  if (uid !== self || (mode & 0o077) !== 0) {
    throw new Error(`${folder} belongs to somebody else or is open to others (mode ${(mode & 0o777).toString(8)})`);
  }
  return folder;
}

export function createRunFolder(now: Date): RunFolder {
  const path = mkdtempSync(join(runsFolder(), "r-"));
  const allLogs = join(process.env.XDG_STATE_HOME ?? join(homedir(), ".local/state"), "muster/logs");
  const stamp = now.toISOString().replaceAll(/[:.]/g, "-");
  const logs = join(allLogs, `${stamp}-${process.pid}`);
  mkdirSync(logs, { recursive: true, mode: 0o700 });
  const old = readdirSync(allLogs).sort().reverse().slice(LOG_FOLDERS_KEPT);
  for (const folder of old) rmSync(join(allLogs, folder), { recursive: true, force: true });
  return { path, control: `unix:${join(path, "control.sock")}`, logs };
}

/** Control sockets of runs that seem to be up, newest first. */
export function findRuns(): { path: string; control: string }[] {
  const folder = runsFolder();
  return readdirSync(folder)
    .map((name) => join(folder, name))
    .filter((path) => {
      try {
        return statSync(join(path, "control.sock")).isSocket();
      } catch {
        return false;
      }
    })
    .sort((a, b) => statSync(b).mtimeMs - statSync(a).mtimeMs)
    .map((path) => ({ path, control: `unix:${join(path, "control.sock")}` }));
}
