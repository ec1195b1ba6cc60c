// Waiting in tests: for a condition, with a bound; never for a time.

const POLL_MS = 10;
const BOUND_MS = 20_000;

/** Resolves when `isTrue`; rejects, naming what was awaited, after `boundMs`. */
export async function until(
  isTrue: () => boolean | Promise<boolean>,
  what: string,
  boundMs: number = BOUND_MS,
): Promise<void> {
  const deadline = performance.now() + boundMs;
  while (!(await isTrue())) {
    if (performance.now() > deadline) throw new Error(`waited ${boundMs} ms in vain until ${what}`);
    await new Promise((wake) => setTimeout(wake, POLL_MS));
  }
}

/** Whether a process runs; a zombie does not. */
export function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}
