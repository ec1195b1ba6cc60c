// The control-plane binary: where it is cached, why it cannot be had, and the one build of it.
// Owns the cache folder $XDG_CACHE_HOME/muster/controlplane/<hash of the Go sources>, outside the checkout, so that a fresh
// clone on the same machine does not compile for ten minutes again. Does not own Go's module and build caches.
//
//   B1  a binary in the cache is whole: it is built under another name and renamed.
//   B2  one build at a time for each hash: a lock file with the builder's process id; a dead builder's lock is taken over.
//   B3  a builder ends with the process that asked for it (its standard input is the lifeline) and Go keeps what it compiled.
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { isAlive } from "../../until.ts";

/** Everything that decides what is built. */
const SOURCES = ["main.go", "go.mod", "go.sum"];
const KUBERNETES_VERSION = "1.37.2";
const GO_MINOR_OLDEST = 26;
/** What networks of pods are joined by. */
const PAIR = ["ip", "link", "add", "one", "type", "veth", "peer", "name", "other"];
const LOCK_POLL_MS = 500;
export const BUILD_TIMEOUT_MS = 25 * 60_000; // 10.5 minutes on two idle cores; tests run on the same two

/** Path that the binary of these sources has in the cache, built or not. */
export function cachedPath(): string {
  const hash = createHash("sha256");
  for (const name of SOURCES) hash.update(name).update(readFileSync(join(import.meta.dirname, name)));
  hash.update(linkFlags());
  const cache = process.env.XDG_CACHE_HOME || join(homedir(), ".cache");
  return join(cache, "muster", "controlplane", hash.digest("hex").slice(0, 16), "controlplane");
}

/** Why no control plane can run here, in words for a skip; undefined where one can. */
export function whyNoControlPlane(): string | undefined {
  if (process.env.MUSTER_SKIP_CONTROLPLANE === "1") return "MUSTER_SKIP_CONTROLPLANE=1";
  if (process.getuid?.() !== 0) return "not root: no network and mount namespaces";
  if (spawnSync("unshare", ["--net", "--mount", "--uts", ...PAIR], { stdio: "ignore" }).status !== 0)
    return `no namespaces: \`unshare --net --mount --uts ${PAIR.join(" ")}\` fails`;
  return existsSync(cachedPath()) ? undefined : whyNoBuild();
}

function whyNoBuild(): string | undefined {
  const go = spawnSync("go", ["env", "GOVERSION"], {
    encoding: "utf8",
    env: { ...process.env, GOTOOLCHAIN: "local" },
    cwd: "/", // outside any module: only the version is asked
  });
  if (go.status !== 0) return "no Go toolchain";
  const minor = Number(/^go1\.(\d+)/.exec(go.stdout)?.[1] ?? 0);
  return minor < GO_MINOR_OLDEST ? `no Go toolchain >= 1.${GO_MINOR_OLDEST} (${go.stdout.trim()})` : undefined;
}

/** The binary's path; builds it, or waits for whoever builds it, where it is not cached. Throws with the build's last words. */
export async function controlPlaneBinary(signal: AbortSignal = AbortSignal.timeout(BUILD_TIMEOUT_MS)): Promise<string> {
  const path = cachedPath();
  if (existsSync(path)) return path;
  const builder = spawn("nice", ["-n", "19", process.execPath, join(import.meta.dirname, "build.ts"), "--lifeline"], {
    stdio: ["pipe", "inherit", "pipe"],
    signal,
  });
  let said = "";
  builder.stderr.on("data", (chunk: Buffer) => {
    said = (said + chunk.toString()).slice(-4_000);
  });
  builder.stdin.on("error", () => {}); // it ended first: its exit code tells
  const code = await new Promise((done, fail) => builder.on("close", done).on("error", fail));
  if (!existsSync(path)) throw new Error(`the control plane was not built (exit ${code}):\n${said}`);
  return path;
}

/** Builds under the lock (B2). Resolves with the path; `say` hears one line when a build begins and one when it is done. */
export async function buildUnderLock(say: (line: string) => void, signal: AbortSignal): Promise<string> {
  const path = cachedPath();
  const folder = join(path, "..");
  const lock = join(folder, "lock");
  mkdirSync(folder, { recursive: true });
  while (!existsSync(path) && !takeLock(lock)) await pause(LOCK_POLL_MS, signal);
  if (existsSync(path)) return path;
  try {
    say(`building the Kubernetes ${KUBERNETES_VERSION} control plane for tests (about 10 minutes, once) ...`);
    const started = performance.now();
    await compile(`${path}.${process.pid}`, signal);
    renameSync(`${path}.${process.pid}`, path);
    say(`control plane built in ${((performance.now() - started) / 1000).toFixed(0)} s: ${path}`);
    return path;
  } finally {
    rmSync(`${path}.${process.pid}`, { force: true });
    rmSync(lock, { force: true });
  }
}

function takeLock(lock: string): boolean {
  try {
    writeFileSync(lock, `${process.pid}\n`, { flag: "wx" });
    return true;
  } catch {
    // Held. An empty file is a holder between its two calls; it is alive.
    const holder = existsSync(lock) ? Number(readFileSync(lock, "utf8")) : 0;
    if (holder > 0 && !isAlive(holder)) rmSync(lock, { force: true });
    return false;
  }
}

function linkFlags(): string {
  const [major, minor] = KUBERNETES_VERSION.split(".");
  const version = { gitVersion: `v${KUBERNETES_VERSION}`, gitMajor: major, gitMinor: minor, gitTreeState: "clean" };
  const stamps = Object.entries(version).map(([name, value]) => `-X k8s.io/component-base/version.${name}=${value}`);
  return ["-s -w", ...stamps].join(" ");
}

async function compile(output: string, signal: AbortSignal): Promise<void> {
  const go = spawn(
    "go",
    ["build", "-p", "2", "-mod=readonly", "-trimpath", "-ldflags", linkFlags(), "-o", output, "."],
    {
      cwd: import.meta.dirname,
      env: { ...process.env, CGO_ENABLED: "0", GOTOOLCHAIN: "local" },
      stdio: ["ignore", "ignore", "pipe"],
      signal,
    },
  );
  let said = "";
  go.stderr.on("data", (chunk: Buffer) => {
    said = (said + chunk.toString()).slice(-4_000); // the last words hold the error; downloads come first
  });
  const code = await new Promise((done, fail) => go.on("close", done).on("error", fail));
  if (code !== 0) throw new Error(`go build ended with ${code}:\n${said}`);
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((done, fail) => {
    signal.throwIfAborted();
    const timer = setTimeout(done, ms);
    const abandon = () => {
      clearTimeout(timer);
      fail(signal.reason);
    };
    signal.addEventListener("abort", abandon, { once: true });
  });
}
