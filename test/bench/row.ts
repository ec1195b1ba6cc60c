// What every bench does with its figures: median, the commit they belong to, one row of CSV.
import { execFileSync } from "node:child_process";
import { appendFileSync, existsSync, mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((one, other) => one - other);
  const middle = Math.floor(sorted.length / 2);
  const upper = sorted[middle] ?? Number.NaN;
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? Number.NaN)) / 2;
}

/** Short hash; a `+` where the tree has changes. */
export function commit(): string {
  const git = (...args: string[]) =>
    execFileSync("git", args, {
      cwd: import.meta.dirname,
      encoding: "utf8",
      stdio: ["ignore", "pipe", "ignore"],
    }).trim();
  try {
    // Rows of earlier runs do not make the code another one.
    const isChanged = git("status", "--porcelain", "--", ":/", ":(exclude,top)test/bench/results") !== "";
    return `${git("rev-parse", "--short", "HEAD")}${isChanged ? "+" : ""}`;
  } catch {
    return "unknown"; // not a git checkout
  }
}

/** Appends to a file that begins with `header`. */
export function appendRow(file: string, header: string, cells: readonly (string | number)[]): void {
  mkdirSync(dirname(file), { recursive: true });
  if (!existsSync(file)) writeFileSync(file, `${header}\n`);
  appendFileSync(file, `${cells.map((cell) => String(cell).replaceAll(",", " ")).join(",")}\n`);
}
