// Builds the control-plane binary into the cache, once: `node test/cluster/controlplane/build.ts [--lifeline]`.
// With --lifeline it ends when its standard input does, so that no build outlives the test run that wanted it.
import { BUILD_TIMEOUT_MS, buildUnderLock } from "./binary.ts";

const ended = new AbortController();
if (process.argv.includes("--lifeline")) {
  process.stdin.resume();
  process.stdin.on("close", () => ended.abort(new Error("whoever wanted the build has ended")));
}
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => ended.abort(new Error(signal)));
try {
  const bound = AbortSignal.any([ended.signal, AbortSignal.timeout(BUILD_TIMEOUT_MS)]);
  await buildUnderLock((line) => process.stdout.write(`${line}\n`), bound);
  process.exit(0); // standard input may still be open
} catch (error) {
  process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
  process.exit(1);
}
