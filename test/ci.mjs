// What .ci/run does: npm test, lint, types, proto lint, sanitizer build of the native tests; and, taken alone and serially,
// best of three: the two times that a person feels (set-up with nothing to do; start to first token) and the gateway's overhead.
// A skip needs a line in EXPLAINED_SKIPS, else it fails. The timings come first and alone: `npm test` may build a control plane
// beside its own tests.
import { spawn, spawnSync } from "node:child_process";
import { existsSync, readFileSync, rmSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { runNative } from "./run.mjs";

const ROOT = resolve(fileURLToPath(import.meta.url), "../..");
const SETUP_IDLE_S_MAX = 2;
const FIRST_TOKEN_S_MAX = 5;
const SETUP_FRESH_S_MAX = 240;

/** Why a test may be skipped on some machine: its reason, or the name of one that is about an instruction set. */
const EXPLAINED_SKIPS = [/this CPU (lacks|has no) AVX/i, /isa avx(2|512): the tokens of this CPU's best/];

let passed = 0;
let failed = 0;

function judge(name, isGood, detail = "") {
  console.log(`${isGood ? "ok" : "not ok"} - ${name}${detail ? ` (${detail})` : ""}`);
  if (isGood) passed++;
  else failed++;
}

function command(name, file, args) {
  const started = Date.now();
  const out = spawnSync(file, args, { cwd: ROOT, stdio: "inherit", timeout: 60 * 60_000 });
  judge(name, out.status === 0, `${((Date.now() - started) / 1000).toFixed(1)} s`);
}

const seconds = (from) => (Date.now() - from) / 1000;

/** Starts `npm start` on free ports and asks for one token as soon as it says that it is ready. */
async function startToFirstToken() {
  const started = Date.now();
  const child = spawn("npm", ["start", "--silent", "--", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--json"], {
    cwd: ROOT,
    stdio: ["ignore", "pipe", "inherit"],
    detached: true,
  });
  try {
    const line = await new Promise((done, fail) => {
      let text = "";
      child.stdout.on("data", (chunk) => {
        text += chunk;
        const found = text.split("\n").find((l) => l.startsWith("{") && l.endsWith("}"));
        if (found) done(found);
      });
      child.on("close", () => fail(new Error("npm start ended before it was ready")));
      setTimeout(() => fail(new Error("npm start was not ready in 60 s")), 60_000).unref();
    });
    const { http } = JSON.parse(line);
    const answer = await fetch(`${http}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "nano-maverick", prompt: "Mr. Speaker", max_tokens: 1, temperature: 0 }),
    });
    await answer.json();
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    return seconds(started);
  } finally {
    const gone = new Promise((done) => child.on("close", done));
    try {
      process.kill(-child.pid, "SIGINT");
    } catch {
      // already gone
    }
    await gone;
  }
}

async function bestOfThree(measure) {
  const times = [];
  for (let i = 0; i < 3; i++) times.push(await measure());
  return Math.min(...times);
}

async function timing(name, limit, measure) {
  try {
    const best = await bestOfThree(measure);
    judge(`${name} < ${limit} s`, best < limit, `best of three ${best.toFixed(2)} s`);
  } catch (error) {
    judge(`${name} < ${limit} s`, false, error.message);
  }
}

/** Share of the engines' own speed that is left through the gateway; the bench exits with 1 below a half. The best of three. */
function overhead() {
  const bench = ["test/bench/run.mjs", "overhead", "5"];
  for (let attempt = 1; ; attempt++) {
    const said = spawnSync("node", bench, { cwd: ROOT, encoding: "utf8", timeout: 5 * 60_000 });
    const share = /^share a \/ b +([\d.]+) %/m.exec(said.stdout)?.[1];
    if (said.status !== 0 && attempt < 3) continue;
    if (share === undefined) console.log(`${said.stdout}${said.stderr}`);
    return judge(
      "tokens/s through the gateway >= 50 % of the bare engines",
      said.status === 0,
      `${share} %, run ${attempt}`,
    );
  }
}

const fresh = !existsSync(join(ROOT, "node_modules"));
const setupStarted = Date.now();
const setup = spawnSync("node", ["controller/cli/setup.mjs"], { cwd: ROOT, stdio: "inherit" });
if (setup.status !== 0) {
  judge("set-up", false);
  console.log(`${passed} passed, ${failed} failed`);
  process.exit(1);
}
if (fresh)
  judge(
    `set-up of a fresh checkout < ${SETUP_FRESH_S_MAX} s`,
    seconds(setupStarted) < SETUP_FRESH_S_MAX,
    `${seconds(setupStarted).toFixed(0)} s`,
  );

await timing("set-up with nothing to do", SETUP_IDLE_S_MAX, async () => {
  const started = Date.now();
  spawnSync("node", ["controller/cli/setup.mjs"], { cwd: ROOT, stdio: "ignore" });
  return seconds(started);
});
await timing("npm start to first token", FIRST_TOKEN_S_MAX, startToFirstToken);
overhead();

rmSync(join(ROOT, ".tools/tests.json"), { force: true });
spawnSync("npm", ["test"], { cwd: ROOT, stdio: "inherit", timeout: 120 * 60_000, env: { ...process.env, CI: "true" } });
if (existsSync(join(ROOT, ".tools/tests.json"))) {
  const tests = JSON.parse(readFileSync(join(ROOT, ".tools/tests.json"), "utf8"));
  passed += tests.passed;
  failed += tests.failed;
  for (const skip of tests.skipped)
    if (!EXPLAINED_SKIPS.some((reason) => reason.test(skip))) judge(`unexplained skip: ${skip}`, false);
} else judge("npm test", false, "wrote no result");

const bin = (name) => join(ROOT, "node_modules/.bin", name);
command("lint (biome)", bin("biome"), ["check", "."]);
command("types (tsc)", bin("tsc"), ["--noEmit"]);
command("proto lint (buf)", bin("buf"), ["lint"]);

const path = [join(ROOT, ".tools/bin"), process.env.PATH].join(":");
const cmake = (...args) =>
  spawnSync("cmake", args, { cwd: ROOT, stdio: "inherit", env: { ...process.env, PATH: path } }).status === 0;
const isBuilt =
  cmake(
    "-S",
    "native",
    "-B",
    "native/build-sanitize",
    "-G",
    "Ninja",
    "-DMUSTER_SANITIZE=ON",
    "-DCMAKE_BUILD_TYPE=None",
  ) && cmake("--build", "native/build-sanitize");
judge("sanitizer build", isBuilt);
if (isBuilt) {
  const sanitized = runNative(join(ROOT, "native/build-sanitize"));
  passed += sanitized.passed;
  failed += sanitized.failed;
}

console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
