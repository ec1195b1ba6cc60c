// Runs every test: native executables first, then vitest, then vitest on a real Kubernetes control plane. Called by `npm test`
// after the set-up; plain JavaScript, because it may be started by an older Node than the checkout's own.
//
//   node test/run.mjs [--native-only] [vitest arguments]
//
// The last line is "N passed, N failed, N skipped"; skips are listed with their reasons. The counts go to .tools/tests.json.
// Where the control plane's binary is not in the cache it is built meanwhile, at the lowest priority. A machine that cannot have
// one skips these tests and says why; with CI=true that is a failure.
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = resolve(fileURLToPath(import.meta.url), "../..");
const NODE = join(ROOT, "node_modules", `node-linux-${process.arch}`, "bin", "node");
const NATIVE_TIMEOUT_MS = 5 * 60_000;

/** Runs the native tests of one build folder; prints failures and a line for each executable. */
export function runNative(build) {
  const total = { passed: 0, failed: 0, skipped: [] };
  const names = existsSync(build)
    ? readdirSync(build)
        .filter((name) => name.endsWith("_test"))
        .sort()
    : [];
  if (names.length === 0) {
    console.log(`not ok - no native tests in ${build}`);
    total.failed++;
  }
  for (const name of names) {
    const started = Date.now();
    const out = spawnSync(join(build, name), [], { encoding: "utf8", timeout: NATIVE_TIMEOUT_MS, maxBuffer: 64 << 20 });
    const lines = (out.stdout ?? "").split("\n");
    const count = (start) => lines.filter((line) => line.startsWith(start)).length;
    const failed = count("not ok - ");
    const crashed = out.status !== 0 && failed === 0;
    total.passed += count("ok - ");
    total.failed += failed + (crashed ? 1 : 0);
    for (const line of lines.filter((l) => l.startsWith("skip - "))) total.skipped.push(`${name}: ${line.slice(7)}`);
    const seconds = ((Date.now() - started) / 1000).toFixed(1);
    console.log(
      `${failed || crashed ? "FAIL" : "  ok"} ${name}: ${count("ok - ")} passed, ${failed} failed, ${seconds} s`,
    );
    if (failed || crashed)
      console.log(`${out.stdout}${out.stderr}${crashed ? `ended with ${out.signal ?? out.status}` : ""}`);
  }
  return total;
}

/** One vitest run; `name` is that of its report. Resolves with its counts. */
function runVitest(name, args, env = {}) {
  const report = join(ROOT, `.tools/${name}.json`);
  rmSync(report, { force: true });
  const vitest = [
    join(ROOT, "node_modules/vitest/vitest.mjs"),
    "run",
    "--reporter=default",
    "--reporter=json",
    `--outputFile.json=${report}`,
  ];
  return new Promise((done) => {
    const child = spawn(NODE, [...vitest, ...args], { cwd: ROOT, stdio: "inherit", env: { ...process.env, ...env } });
    child.on("close", (code) => {
      const total = { passed: 0, failed: 0, skipped: [] };
      if (existsSync(report)) {
        for (const file of JSON.parse(readFileSync(report, "utf8")).testResults) {
          for (const test of file.assertionResults) {
            if (test.status === "passed") total.passed++;
            else if (test.status === "failed") total.failed++;
            else total.skipped.push(`${file.name.slice(ROOT.length + 1)}: ${test.fullName}`);
          }
          if (file.status === "failed" && file.assertionResults.every((test) => test.status !== "failed"))
            total.failed++;
        }
      }
      if (code !== 0 && total.failed === 0) total.failed++;
      done(total);
    });
  });
}

// ---- on a real control plane ----

const CLUSTER_ENV = { MUSTER_TEST_CLUSTER: "1" };
/** What a build may say at last. */
const WORDS_MAX = 4_000;

/** Whether these vitest arguments pick any of the cluster tests. */
function picksCluster(args) {
  const vitest = join(ROOT, "node_modules/vitest/vitest.mjs");
  const env = { ...process.env, ...CLUSTER_ENV };
  const said = spawnSync(NODE, [vitest, "list", "--filesOnly", ...args], { cwd: ROOT, encoding: "utf8", env });
  return /\.test\.ts/.test(said.stdout);
}

/**
 * Begins to build the control plane where it has to be built. Resolves with why there is none, undefined where there is one.
 * The build ends with this process: its standard input is the lifeline, and its own bound ends it in any case.
 */
function beginControlPlane() {
  const build = join(ROOT, "test/cluster/controlplane/build.ts");
  const why = spawnSync(NODE, [build, "--why-not"], { encoding: "utf8" });
  if (why.status !== 0) return Promise.resolve(why.stdout.trim() || why.stderr.trim());
  const child = spawn("nice", ["-n", "19", NODE, build, "--lifeline"], { stdio: ["pipe", "inherit", "pipe"] });
  let said = "";
  child.stderr.on("data", (chunk) => {
    said = (said + chunk).slice(-WORDS_MAX);
  });
  child.stdin.on("error", () => {}); // it ended first: its exit code tells
  return new Promise((done) => {
    child.on("error", (error) => done(`its build cannot be started: ${error.message}`));
    child.on("close", (code) => done(code === 0 ? undefined : `it was not built: ${said.trim() || `exit ${code}`}`));
  });
}

/** Required in CI; else a machine without a control plane skips these tests, counted. */
async function runCluster(plane, args) {
  const why = await plane;
  if (why === undefined) return await runVitest("vitest-cluster", args, CLUSTER_ENV);
  const isRequired = process.env.CI === "true";
  console.log(`${isRequired ? "not ok" : "skip"} - tests on a Kubernetes control plane: ${why}`);
  const skip = `test/cluster: tests on a Kubernetes control plane: ${why.split("\n").at(-1)}`;
  return { passed: 0, failed: isRequired ? 1 : 0, skipped: isRequired ? [] : [skip] };
}

async function runAll(args, isNativeOnly) {
  const hasCluster = !isNativeOnly && (args.length === 0 || picksCluster(args));
  const plane = hasCluster ? beginControlPlane() : undefined;
  const parts = [runNative(join(ROOT, "native/build"))];
  if (!isNativeOnly) parts.push(await runVitest("vitest", hasCluster ? [...args, "--passWithNoTests"] : args));
  if (plane !== undefined) parts.push(await runCluster(plane, args));
  return parts;
}

if (resolve(process.argv[1] ?? "") === fileURLToPath(import.meta.url)) {
  const set = spawnSync(process.execPath, [join(ROOT, "controller/cli/setup.mjs"), "--all"], { stdio: "inherit" });
  if (set.status !== 0) process.exit(1);
  const args = process.argv.slice(2).filter((argument) => argument !== "--native-only");
  const parts = await runAll(args, process.argv.includes("--native-only"));
  const total = {
    passed: parts.reduce((sum, part) => sum + part.passed, 0),
    failed: parts.reduce((sum, part) => sum + part.failed, 0),
    skipped: parts.flatMap((part) => part.skipped),
  };
  for (const skip of total.skipped) console.log(`skipped: ${skip}`);
  mkdirSync(join(ROOT, ".tools"), { recursive: true });
  writeFileSync(join(ROOT, ".tools/tests.json"), JSON.stringify(total));
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped.length} skipped`);
  process.exit(total.failed ? 1 : 0);
}
