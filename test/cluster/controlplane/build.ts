// Builds the control-plane binary into the cache, once: `node test/cluster/controlplane/build.ts [--lifeline | --why-not]`.
// With --lifeline it ends when its standard input does, so that no build outlives the test run that wanted it.
// With --why-not it builds nothing: it says why no control plane can run here and exits with 1, or says nothing and exits with 0.
import { BUILD_TIMEOUT_MS, buildUnderLock, whyNoControlPlane } from "./binary.ts";

if (process.argv.includes("--why-not")) {
  const why = whyNoControlPlane();
  if (why !== undefined) process.stdout.write(`${why}\n`);
  process.exit(why === undefined ? 0 : 1);
}

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
