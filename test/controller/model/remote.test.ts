// Sources behind HTTP, against a real server on loopback: ranges, resuming, refusals, the cache and its limits.
import { createHash } from "node:crypto";
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeEach, expect, test } from "vitest";
import { type Progress, type ReadModelOptions, readModel } from "../../../controller/model/model.ts";
import { FaultError } from "../../../proto/fault.ts";
import { Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";
import { FileServer } from "./file-server.ts";

const server = await FileServer.start();
const other = await FileServer.start();
const root = mkdtempSync(join(tmpdir(), "muster-remote-"));
afterAll(() => rmSync(root, { recursive: true, force: true }));
let caches = 0;
let cacheDir = "";
const before = { ...process.env };
beforeEach(() => {
  cacheDir = join(root, `cache-${++caches}`);
  server.behave();
  other.behave();
  delete process.env.HF_TOKEN;
  delete process.env.HF_HUB_OFFLINE;
  process.env.HF_ENDPOINT = server.url;
});
afterEach(() => {
  process.env = { ...before };
});

const DRAFT = readFileSync("test/models/nano-draft/nano-draft-Q8_0.gguf");
server.serve("/m/draft.gguf", DRAFT, '"v1"');
for (const name of ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
  server.serve(`/dir/${name}`, readFileSync(`test/models/nano-draft/${name}`), `"${name}-1"`);
for (const name of ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
  for (const revision of ["main", "c0ffee"])
    server.serve(
      `/org/nano/resolve/${revision}/${name}`,
      readFileSync(`test/models/nano-draft/${name}`),
      `"${name}-1"`,
    );

const GGUF = `${server.url}/m/draft.gguf`;
const read = (source: string, options: ReadModelOptions = {}) => readModel(source, { cacheDir, ...options });
async function fault(run: Promise<unknown>): Promise<FaultError> {
  const error = await run.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof FaultError)) throw new Error(`expected a FaultError, got ${String(error)}`);
  return error;
}
const blobs = () => (existsSync(join(cacheDir, "blobs")) ? readdirSync(join(cacheDir, "blobs")) : []);
const complete = () => blobs().filter((name) => !/\.(part|lock)$|\.pin-/.test(name));

test("a GGUF file is downloaded into the cache, and not again", async () => {
  const spec = await read(GGUF);
  const path = spec.files[0]?.path ?? "";
  expect(path.startsWith(cacheDir)).toBe(true);
  expect(readFileSync(path).equals(DRAFT)).toBe(true);
  expect(spec).toMatchObject({ family: "llama", name: "draft", source: GGUF, format: "GGUF Q8_0" });
  server.behave();
  expect((await read(GGUF)).files[0]?.path).toBe(path);
  expect(server.seen.every(({ range }) => range?.startsWith("bytes=0-"))).toBe(true);
  expect(server.seen).toHaveLength(1);
});

test("a plan reads headers only", async () => {
  const spec = await read(GGUF, { headersOnly: true });
  expect(spec.files[0]).toMatchObject({ path: "", bytes: BigInt(DRAFT.length) });
  expect(complete()).toEqual([]);
  expect(server.seen.map(({ range }) => range)).toEqual(["bytes=0-262143"]);
  expect(spec.digest).toBe((await read(GGUF)).digest);
});

test("a directory-like base has config.json, weights and tokenizer", async () => {
  const local = await readModel("builtin://nano-draft");
  for (const base of [`${server.url}/dir`, `${server.url}/dir/`]) {
    const spec = await read(base);
    expect(spec).toMatchObject({ family: "llama", name: "dir", stopIds: local.stopIds });
    expect(spec.tensors).toEqual(local.tensors);
    expect(spec.tokenizer?.vocabHash).toBe(local.tokenizer?.vocabHash);
    expect(readFileSync(spec.files[0]?.path ?? "").length).toBe(Number(local.files[0]?.bytes));
  }
});

test("a server without ranges is read from the start and downloaded whole", async () => {
  server.behave({ ranges: false });
  const spec = await read(GGUF);
  expect(readFileSync(spec.files[0]?.path ?? "").equals(DRAFT)).toBe(true);
});

test("a connection that breaks is continued where it stopped", async () => {
  server.behave({ dropAfter: 300_000, drops: 3 });
  const spec = await read(GGUF);
  expect(readFileSync(spec.files[0]?.path ?? "").equals(DRAFT)).toBe(true);
  const resumed = server.seen.filter(({ range }) => range && !range.startsWith("bytes=0-"));
  const begins = resumed.map(({ range }) => Number(/^bytes=(\d+)-$/.exec(range ?? "")?.[1]));
  expect(begins).toHaveLength(3);
  // What was on its way when the connection broke may be lost; never more than that.
  for (const [k, begin] of begins.entries()) {
    expect(begin).toBeGreaterThan(begins[k - 1] ?? 0);
    expect(begin).toBeLessThanOrEqual((begins[k - 1] ?? 0) + 300_000);
  }
  expect(resumed.every(({ ifRange }) => ifRange === '"v1"')).toBe(true);
});

test("a server that drops for ever is given up, and the next run continues", async () => {
  server.behave({ dropAfter: 0, drops: 100 });
  const first = await fault(read(GGUF));
  expect(first.fault).toMatchObject({ kind: Fault_Kind.TRANSIENT, code: "source_unreachable" });
  server.behave({ dropAfter: 300_000, drops: 1 });
  const aborted = new AbortController();
  const stop = await fault(
    read(GGUF, { signal: aborted.signal, onProgress: ({ bytes }) => bytes >= 300_000 && aborted.abort() }),
  );
  expect(stop.fault.code).toBe("cancelled");
  const part = blobs().find((name) => name.endsWith(".part"));
  expect(part).toBeDefined();
  const have = statSync(join(cacheDir, "blobs", part ?? "")).size;
  expect(have).toBeGreaterThanOrEqual(300_000);
  server.behave();
  expect(readFileSync((await read(GGUF)).files[0]?.path ?? "").equals(DRAFT)).toBe(true);
  expect(server.seen.at(-1)?.range).toBe(`bytes=${have}-`);
}, 60_000);

test("D1: a file that changes while it is downloaded is refused, and read afresh by the next run", async () => {
  const changed = Buffer.from(DRAFT);
  changed[changed.length - 1] = 77;
  server.serve("/m/moving.gguf", DRAFT, '"old"');
  server.behave({ dropAfter: 300_000, drops: 1 });
  const error = await fault(
    read(`${server.url}/m/moving.gguf`, {
      onProgress: ({ bytes }) => bytes > 0 && server.serve("/m/moving.gguf", changed, '"new"'),
    }),
  );
  expect(error.fault).toMatchObject({ kind: Fault_Kind.TRANSIENT, code: "source_changed" });
  expect(error.message).toContain("etag old became new");
  const spec = await read(`${server.url}/m/moving.gguf`);
  expect(readFileSync(spec.files[0]?.path ?? "").equals(changed)).toBe(true);
});

test("D2: content that is not the sha256 the server names is thrown away", async () => {
  const wrong = createHash("sha256").update("something else").digest("hex");
  server.serve("/m/hashed.gguf", DRAFT, `"${wrong}"`);
  const error = await fault(read(`${server.url}/m/hashed.gguf`));
  expect(error.fault.code).toBe("corrupt_download");
  expect(error.message).toContain(wrong);
  expect(blobs().filter((name) => name.startsWith(wrong) && !name.includes(".pin-"))).toEqual([]);
  const right = createHash("sha256").update(DRAFT).digest("hex");
  server.serve("/m/hashed.gguf", DRAFT, `"${right}"`);
  expect((await read(`${server.url}/m/hashed.gguf`)).files[0]?.path).toBe(join(cacheDir, "blobs", right));
});

test("404 names the file", async () => {
  const error = await fault(read(`${server.url}/m/absent.gguf`));
  expect(error.message).toContain("absent.gguf: does not exist in");
  expect((await fault(read(`${server.url}/nothing`))).message).toContain("has no config.json");
});

test("401 names HF_TOKEN", async () => {
  server.behave({ needs: "Bearer secret" });
  const refused = await fault(read("hf://org/nano"));
  expect(refused.message).toContain("HTTP 401");
  expect(refused.message).toContain("set HF_TOKEN");
  expect((await fault(read("hf://org/nano", { hfToken: "wrong" }))).message).toContain(
    "the HF_TOKEN that was sent does not allow it",
  );
  process.env.HF_TOKEN = "secret";
  expect((await read("hf://org/nano")).family).toBe("llama");
});

test("hf:// resolves files of a revision and replaces a branch by its commit", async () => {
  server.behave({ headers: { "x-repo-commit": "c0ffee" } });
  const spec = await read("hf://org/nano@main");
  expect(spec).toMatchObject({ source: "hf://org/nano@c0ffee", name: "nano", family: "llama" });
  const paths = server.seen.map(({ path }) => path);
  expect(paths[0]).toBe("/org/nano/resolve/main/config.json");
  expect(paths.slice(1).every((path) => path.startsWith("/org/nano/resolve/c0ffee/"))).toBe(true);
  expect(existsSync(spec.tokenizer?.jsonPath ?? "")).toBe(true);
});

test("hf:// with a file reads that GGUF, through the redirect that names its sha256", async () => {
  const sha256 = createHash("sha256").update(DRAFT).digest("hex");
  other.serve("/cdn/draft.gguf", DRAFT, '"of-the-cdn"');
  const path = (revision: string) => `/org/nano/resolve/${revision}/draft.gguf`;
  const target = `${other.url}/cdn/draft.gguf`;
  server.behave({
    redirects: { [path("main")]: target, [path("c0ffee")]: target },
    headers: { "x-linked-etag": `"${sha256}"` },
  });
  const spec = await read("hf://org/nano@main/draft.gguf");
  expect(spec).toMatchObject({ source: "hf://org/nano@c0ffee/draft.gguf", name: "draft", format: "GGUF Q8_0" });
  expect(spec.files[0]?.path).toBe(join(cacheDir, "blobs", sha256));
});

test("offline mode uses the cache alone, and says when something is not in it", async () => {
  const online = await read("hf://org/nano@main");
  server.behave();
  process.env.HF_HUB_OFFLINE = "1";
  const offline = await read("hf://org/nano@main");
  expect(server.seen).toEqual([]);
  expect(offline).toEqual(online);
  expect((await fault(read("hf://org/other"))).message).toMatch(
    /hf:\/\/org\/other@main is not in the cache.*HF_HUB_OFFLINE/,
  );
  delete process.env.HF_HUB_OFFLINE;
  expect((await fault(read(GGUF, { offline: true }))).message).toContain("draft.gguf");
  expect(server.seen).toEqual([]);
});

test("N1: a redirect to another host gets no token, one to the same host does", async () => {
  for (const name of ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    other.serve(`/cdn/${name}`, readFileSync(`test/models/nano-draft/${name}`), `"${name}-1"`);
  const redirects: Record<string, string> = {
    "/org/nano/resolve/main/config.json": "/org/nano/resolve/c0ffee/config.json",
    "/org/nano/resolve/c0ffee/model.safetensors": `${other.url}/cdn/model.safetensors?signature=s3cr3t`,
  };
  server.behave({ redirects });
  const spec = await read("hf://org/nano@main", { hfToken: "secret" });
  expect(spec.family).toBe("llama");
  expect(server.seen.length).toBeGreaterThan(3);
  expect(server.seen.every(({ authorization }) => authorization === "Bearer secret")).toBe(true);
  expect(other.seen.length).toBeGreaterThan(0);
  expect(other.seen.every(({ authorization }) => authorization === undefined)).toBe(true);
  expect(JSON.stringify(spec, (_, value) => (typeof value === "bigint" ? String(value) : value))).not.toContain(
    "s3cr3t",
  );
});

test("redirects are bounded, and never lead to unencrypted strangers", async () => {
  server.behave({ redirects: { "/m/loop.gguf": "/m/loop.gguf" } });
  expect((await fault(read(`${server.url}/m/loop.gguf`))).message).toContain("more than 5 redirects");
  server.behave({ redirects: { "/m/out.gguf": "http://example.com/out.gguf" } });
  expect((await fault(read(`${server.url}/m/out.gguf`))).message).toContain("only loopback may use http");
  server.behave({ redirects: { "/m/odd.gguf": "ftp://example.com/out.gguf" } });
  expect((await fault(read(`${server.url}/m/odd.gguf`))).message).toContain("ftp:// cannot be downloaded");
  expect((await fault(read("https://user:word@example.com/x.gguf"))).message).toContain("must not hold a user name");
});

test("what passes is tried again, what stays is given up after five tries", async () => {
  server.behave({ statuses: [503, 429, 500] });
  expect((await read(GGUF)).family).toBe("llama");
  server.behave({ statuses: Array(20).fill(503) });
  const error = await fault(read(GGUF));
  expect(error.fault).toMatchObject({ kind: Fault_Kind.TRANSIENT, code: "source_unreachable" });
  expect(error.message).toContain("HTTP 503, 5 tries");
  expect(server.seen).toHaveLength(5);
}, 60_000);

test("a server that lies about lengths and ranges is refused", async () => {
  server.behave({ headers: { "content-range": "bytes 5-3/2" } });
  expect((await fault(read(GGUF))).message).toContain("Content-Range makes no sense");
  server.behave({ headers: { "content-range": `bytes 0-262143/${2 ** 53}` } });
  expect((await fault(read(GGUF))).message).toContain("Content-Range makes no sense");
  server.behave({ statuses: [418] });
  expect((await fault(read(GGUF))).message).toContain("HTTP 418");
});

test("a model larger than the cache limit is refused before anything is downloaded", async () => {
  const error = await fault(read(GGUF, { cacheBytesMax: 1_000_000 }));
  expect(error.fault.kind).toBe(Fault_Kind.INVALID);
  expect(error.message).toContain(
    `${DRAFT.length} bytes, more than the cache limit of 1000000; raise MUSTER_CACHE_BYTES_MAX`,
  );
  expect(complete()).toEqual([]);
  process.env.MUSTER_CACHE_BYTES_MAX = "1000";
  expect((await fault(read(GGUF))).message).toContain("cache limit of 1000;");
});

test("B2: room is made by removing the oldest blob that nobody uses", async () => {
  const limits = { cacheBytesMax: 2_500_000 };
  await read(GGUF, limits);
  const [mine] = complete();
  const old = join(cacheDir, "blobs", "old");
  const older = join(cacheDir, "blobs", "older");
  const pinned = join(cacheDir, "blobs", "pinned");
  for (const path of [old, older, pinned]) writeFileSync(path, Buffer.alloc(400_000));
  utimesSync(older, 1000, 1000);
  utimesSync(old, 2000, 2000);
  utimesSync(pinned, 500, 500);
  writeFileSync(`${pinned}.pin-${process.pid}`, "");
  server.serve("/m/second.gguf", Buffer.concat([DRAFT]), '"second"');
  await fault(read(`${server.url}/m/second.gguf`, { ...limits, cacheBytesMax: 1_300_000 }));
  expect(existsSync(pinned)).toBe(true);
  const spec = await read(`${server.url}/m/second.gguf`, limits);
  expect(existsSync(spec.files[0]?.path ?? "")).toBe(true);
  expect(existsSync(older)).toBe(false);
  expect(existsSync(pinned)).toBe(true);
  expect(existsSync(join(cacheDir, "blobs", mine ?? ""))).toBe(true);
});

test("B3: a pin of another host, whose processes are not known here, holds for a day", async () => {
  await read(GGUF);
  const blob = (name: string) => join(cacheDir, "blobs", name);
  const dayOld = Date.now() / 1000 - 25 * 3600;
  for (const name of ["held", "left"]) {
    writeFileSync(blob(name), Buffer.alloc(400_000));
    utimesSync(blob(name), 500, 500);
    writeFileSync(blob(`${name}.pin-1@another-pod`), "");
  }
  utimesSync(blob("left.pin-1@another-pod"), dayOld, dayOld);
  await read(GGUF, { cacheBytesMax: DRAFT.length + 500_000 });
  expect(existsSync(blob("held"))).toBe(true);
  expect(existsSync(blob("left"))).toBe(false);
});

test("B3: the pin of a process that is gone holds nothing", async () => {
  await read(GGUF);
  const dead = join(cacheDir, "blobs", "dead");
  writeFileSync(dead, Buffer.alloc(400_000));
  utimesSync(dead, 500, 500);
  writeFileSync(`${dead}.pin-4194999`, "");
  await read(GGUF, { cacheBytesMax: DRAFT.length + 100_000 });
  expect(existsSync(dead)).toBe(false);
});

test("B1: two readers of one file download it once", async () => {
  const specs = await Promise.all([read(GGUF), read(GGUF), read(GGUF)]);
  expect(new Set(specs.map((spec) => spec.files[0]?.path)).size).toBe(1);
  expect(complete()).toHaveLength(1);
  const whole = server.seen.filter(({ range }) => range === undefined);
  expect(whole).toHaveLength(1);
});

test("progress counts up to the bytes of all files", async () => {
  const seen: Progress[] = [];
  await read(GGUF, { onProgress: (progress) => seen.push(progress) });
  expect(seen.at(-1)).toEqual({ file: "draft.gguf", bytes: DRAFT.length, total: DRAFT.length });
  expect(seen.every((progress, i) => progress.bytes >= (seen[i - 1]?.bytes ?? 0))).toBe(true);
});

test("a broken header is refused without downloading the weights", async () => {
  const broken = Buffer.from(DRAFT);
  broken.write("llamq", broken.indexOf("llama"));
  server.serve("/m/broken.gguf", broken, '"b"');
  const error = await fault(read(`${server.url}/m/broken.gguf`));
  expect(error.message).toContain('architecture "llamq" is not supported');
  expect(server.seen).toHaveLength(1);
  expect(complete()).toEqual([]);
});

test("cancelling stops a download with a fault of its own", async () => {
  const stop = new AbortController();
  stop.abort();
  expect((await fault(read(GGUF, { signal: stop.signal }))).fault.code).toBe("cancelled");
});
