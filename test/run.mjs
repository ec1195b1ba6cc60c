// Runs every test: native executables first, then vitest. Called by `npm test` after the set-up; plain JavaScript, because
// it may be started by an older Node than the checkout's own.
//
//   node test/run.mjs [--native-only] [vitest arguments]
//
// The last line is "N passed, N failed, N skipped"; skips are listed with their reasons. The counts go to .tools/tests.json.
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

function runVitest(args) {
  const report = join(ROOT, ".tools/vitest.json");
  rmSync(report, { force: true });
  const vitest = [
    join(ROOT, "node_modules/vitest/vitest.mjs"),
    "run",
    "--reporter=default",
    "--reporter=json",
    `--outputFile.json=${report}`,
  ];
  return new Promise((done) => {
    const child = spawn(NODE, [...vitest, ...args], { cwd: ROOT, stdio: "inherit" });
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

if (resolve(process.argv[1] ?? "") === fileURLToPath(import.meta.url)) {
  const set = spawnSync(process.execPath, [join(ROOT, "controller/cli/setup.mjs"), "--all"], { stdio: "inherit" });
  if (set.status !== 0) process.exit(1);
  const args = process.argv.slice(2).filter((argument) => argument !== "--native-only");
  const parts = [runNative(join(ROOT, "native/build"))];
  if (!process.argv.includes("--native-only")) parts.push(await runVitest(args));
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
