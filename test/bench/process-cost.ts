// What a process has cost so far, as the kernel counts it.
import { readFileSync } from "node:fs";

/** USER_HZ: the unit of /proc, the same on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

/** In MB; VmHWM is the peak. NaN where the process has ended. */
export function memoryMb(pid: number | undefined, field: "VmHWM" | "VmRSS"): number {
  const text = readFileSync(`/proc/${pid}/status`, "utf8");
  return Math.round(Number(new RegExp(`${field}:\\s+(\\d+) kB`).exec(text)?.[1] ?? Number.NaN) / 1024);
}

/** In seconds, of all its threads. */
export function cpuSeconds(pid: number | undefined): number {
  const [, after = ""] = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ");
  const [user, system] = after.split(" ").slice(11, 13).map(Number);
  return ((user ?? Number.NaN) + (system ?? Number.NaN)) / TICKS_PER_SECOND;
}
