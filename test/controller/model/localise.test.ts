// A plan's files brought to a worker's machine: what must be the same, what is transferred, and what stays where it ends early.
import { createHash } from "node:crypto";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeEach, expect, test } from "vitest";
import { localise } from "../../../controller/model/localise.ts";
import { readModel } from "../../../controller/model/model.ts";
import { FaultError } from "../../../proto/fault.ts";
import { ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";
import { FileServer } from "./file-server.ts";

const server = await FileServer.start();
const root = mkdtempSync(join(tmpdir(), "muster-localise-"));
afterAll(() => rmSync(root, { recursive: true, force: true }));
let caches = 0;
let cacheDir = "";
const NAMES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
const own = (name: string) => readFileSync(`test/models/nano-draft/${name}`);
const sha256 = (bytes: Buffer) => createHash("sha256").update(bytes).digest("hex");

beforeEach(() => {
  cacheDir = join(root, `cache-${++caches}`);
  server.behave();
  for (const name of NAMES) server.serve(`/m/${name}`, own(name), `"${sha256(own(name))}"`);
  server.serve("/draft.gguf", own("nano-draft-Q8_0.gguf"), '"gguf-1"');
});

async function planOf(path: string): Promise<ShardPlan> {
  const model = await readModel(`${server.url}${path}`, {
    cacheDir: join(root, `controller-${caches}`),
    headersOnly: true,
    tokenizer: true,
  });
  server.behave();
  return ShardPlan.fromPartial({ revision: "r", model });
}

async function faultOf(run: Promise<unknown>): Promise<FaultError["fault"]> {
  const error = await run.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof FaultError)) throw new Error(`expected a FaultError, got ${String(error)}`);
  return error.fault;
}
const blobs = () => (existsSync(join(cacheDir, "blobs")) ? readdirSync(join(cacheDir, "blobs")) : []);

test("L2: paths become local, everything else stays the plan's", async () => {
  const plan = await planOf("/m/");
  expect(plan.model?.files.map(({ path }) => path)).toEqual([""]);
  const seen: [number, number][] = [];
  const local = await localise(plan, { cacheDir, onProgress: (bytes, total) => seen.push([bytes, total]) });
  const [file] = local.model?.files ?? [];
  expect(readFileSync(file?.path ?? "").equals(own("model.safetensors"))).toBe(true);
  expect(local.model?.tokenizer?.jsonPath.startsWith(cacheDir)).toBe(true);
  const size = own("model.safetensors").length;
  expect(seen.at(-1)).toEqual([size, size]);
  expect(seen.every(([bytes, total], index) => total === size && bytes >= (seen[index - 1]?.[0] ?? 0))).toBe(true);
  const without = (each: ShardPlan) => ({
    ...each,
    model: each.model && { ...each.model, files: [], tokenizer: { ...each.model.tokenizer, jsonPath: "" } },
  });
  expect(without(local)).toEqual(without(plan));
});

test("GGUF: the tokenizer is made from the header, in the worker's cache", async () => {
  const local = await localise(await planOf("/draft.gguf"), { cacheDir });
  expect(readFileSync(local.model?.files[0]?.path ?? "").equals(own("nano-draft-Q8_0.gguf"))).toBe(true);
  expect(local.model?.tokenizer?.jsonPath.startsWith(cacheDir)).toBe(true);
  expect(existsSync(local.model?.tokenizer?.jsonPath ?? "")).toBe(true);
});

test("a model that lies here already is read where it lies", async () => {
  const model = await readModel("builtin://nano-draft");
  const elsewhere = { ...model, files: model.files.map((file) => ({ ...file, path: "/elsewhere" })) };
  const local = await localise(ShardPlan.fromPartial({ model: elsewhere }), { cacheDir });
  expect(local.model?.files).toEqual(model.files);
  expect(blobs()).toEqual([]);
});

test("L1: another length is refused by the file's name, before anything is brought", async () => {
  const plan = await planOf("/m/");
  server.serve("/m/model.safetensors", Buffer.concat([own("model.safetensors"), Buffer.alloc(1)]), '"longer"');
  const fault = await faultOf(localise(plan, { cacheDir }));
  expect(fault.kind).toBe(Fault_Kind.INVALID);
  expect(fault.field).toContain("model.safetensors");
  expect(blobs().filter((name) => name.includes(sha256(own("model.safetensors"))))).toEqual([]);
});

test("L1: another content of the same length and header is refused by the file's name", async () => {
  const plan = await planOf("/m/");
  const other = own("model.safetensors");
  other.writeUInt8(other.readUInt8(other.length - 1) ^ 1, other.length - 1);
  server.serve("/m/model.safetensors", other, `"${sha256(other)}"`);
  const fault = await faultOf(localise(plan, { cacheDir }));
  expect(fault).toMatchObject({ kind: Fault_Kind.INVALID, field: "model.safetensors", code: "model_changed" });
  expect(fault.detail).toContain("let a new revision be planned");
});

test("content that is not what its server calls it is thrown away", async () => {
  const plan = await planOf("/m/");
  const broken = own("model.safetensors");
  broken.writeUInt8(broken.readUInt8(broken.length - 1) ^ 1, broken.length - 1);
  server.serve("/m/model.safetensors", broken, `"${sha256(own("model.safetensors"))}"`);
  const fault = await faultOf(localise(plan, { cacheDir }));
  expect(fault).toMatchObject({ kind: Fault_Kind.TRANSIENT, field: "model.safetensors", code: "corrupt_download" });
  expect(blobs().filter((name) => name === sha256(own("model.safetensors")))).toEqual([]);
});

test("a connection that is cut is continued where it broke", async () => {
  const plan = await planOf("/m/");
  const half = Math.floor(own("model.safetensors").length / 2);
  server.behave({ dropAfter: half, drops: 1 });
  const local = await localise(plan, { cacheDir });
  expect(readFileSync(local.model?.files[0]?.path ?? "").equals(own("model.safetensors"))).toBe(true);
  const begins = server.seen
    .filter(({ path }) => path === "/m/model.safetensors")
    .map(({ range }) => Number(/^bytes=(\d+)-$/.exec(range ?? "")?.[1] ?? 0));
  expect(begins.some((begin) => begin > 0 && begin <= half)).toBe(true);
});

test("cancelled, it ends at once; what came stays and is continued", async () => {
  const plan = await planOf("/m/");
  const stop = new AbortController();
  const size = own("model.safetensors").length;
  const onProgress = (bytes: number) => {
    if (bytes > 0 && bytes < size) stop.abort();
  };
  const fault = await faultOf(localise(plan, { cacheDir, signal: stop.signal, onProgress }));
  expect(fault).toMatchObject({ kind: Fault_Kind.TRANSIENT, code: "cancelled" });
  expect(blobs().some((name) => name.endsWith(".lock"))).toBe(false);
  const local = await localise(plan, { cacheDir });
  expect(readFileSync(local.model?.files[0]?.path ?? "").equals(own("model.safetensors"))).toBe(true);
});

test("two workers that share a cache transfer it once, and both tell how far it is", async () => {
  const plan = await planOf("/m/");
  const told = [0, 0];
  const both = await Promise.all(
    told.map((_, index) =>
      localise(plan, { cacheDir, onProgress: (bytes) => (told[index] = Math.max(told[index] ?? 0, bytes)) }),
    ),
  );
  expect(both[0]?.model?.files).toEqual(both[1]?.model?.files);
  const whole = server.seen.filter(
    ({ path, range }) => path === "/m/model.safetensors" && !/^bytes=\d+-\d+$/.test(range ?? ""),
  );
  expect(whole).toHaveLength(1);
  expect(told).toEqual([own("model.safetensors").length, own("model.safetensors").length]);
});
