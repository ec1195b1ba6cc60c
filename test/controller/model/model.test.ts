// What the headers of the models in the repository mean.
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { FaultError } from "../../../proto/fault.ts";
import {
  MaskSpec_Kind,
  type ModelSpec,
  MoeSpec_Score,
  RopeSpec_Layout,
  ShardRule,
  StoredType,
  TensorRole,
  type TensorSpec,
} from "../../../proto/gen/muster/v1/plan.ts";
import { cacheDir } from "./craft.ts";

const read = (source: string): Promise<ModelSpec> => readModel(source, { cacheDir });
const plane = (spec: ModelSpec, role: TensorRole, block = -1, expert = -1): TensorSpec => {
  const found = spec.tensors.filter((t) => t.role === role && t.block === block && t.expert === expert);
  expect(found).toHaveLength(1);
  const [only] = found;
  if (!only) throw new Error("no such plane");
  return only;
};

test("nano-maverick: layers, experts, rope and masks are those of its config.json", async () => {
  const spec = await read("builtin://nano-maverick");
  expect(spec).toMatchObject({
    name: "nano-maverick",
    family: "llama4",
    source: "builtin://nano-maverick",
    vocabSize: 2048,
    hiddenSize: 256,
    contextTokens: 2048,
    normEps: 1e-5,
    tiedHead: false,
    planOnly: "",
    format: "safetensors BF16",
    stopIds: [2043, 2046],
    bosId: 2042,
    parameters: 6035712n,
  });
  expect(spec.blocks.map((block) => block.mlp?.$case)).toEqual(["dense", "moe", "dense", "moe"]);
  const [first, , , last] = spec.blocks.map((block) => block.attention);
  expect(first).toMatchObject({ heads: 8, kvHeads: 2, headDim: 32, qkUnitNorm: true, temperatureScale: 0 });
  expect(first?.rope).toMatchObject({ layout: RopeSpec_Layout.INTERLEAVED, dims: 32, theta: 500_000 });
  expect(first?.mask).toEqual({ kind: MaskSpec_Kind.CHUNKED, span: 8192 });
  expect(last?.rope?.layout).toBe(RopeSpec_Layout.NONE);
  expect(last).toMatchObject({ qkUnitNorm: false, temperatureScale: 0.1, temperatureFloor: 8192 });
  expect(last?.mask?.kind).toBe(MaskSpec_Kind.FULL);
  expect(spec.blocks[1]?.mlp?.value).toMatchObject({ experts: 8, topK: 1, expertFfn: 256, sharedFfn: 256 });
  expect(spec.blocks[1]?.mlp?.value).toMatchObject({ score: MoeSpec_Score.SIGMOID_INPUT });
  expect(spec.kvGroups).toEqual([
    { blocks: [0, 1, 2, 3], live: { kind: MaskSpec_Kind.FULL, span: 0 }, kvHeads: 2, headDim: 32 },
  ]);
});

test("fused experts are planes of one transposed tensor, gate before up", async () => {
  const spec = await read("builtin://nano-maverick");
  const gate = plane(spec, TensorRole.EXPERT_GATE, 1, 3);
  const up = plane(spec, TensorRole.EXPERT_UP, 1, 3);
  const first = plane(spec, TensorRole.EXPERT_GATE, 1, 0);
  expect(gate).toMatchObject({ transposed: true, rows: 256, cols: 256, rowsStored: 512, rowFirst: 0 });
  expect(up).toMatchObject({ transposed: true, rowsStored: 512, rowFirst: 256, offset: gate.offset });
  expect(gate.offset - first.offset).toBe(BigInt(3 * 256 * 512 * 2));
  const down = plane(spec, TensorRole.EXPERT_DOWN, 1, 3);
  expect(down).toMatchObject({ transposed: true, rows: 256, cols: 256, rowsStored: 256, rowFirst: 0 });
  expect(down.rule).toBe(ShardRule.EXPERT);
});

test("a plane's offset points at the value that the checkpoint holds there", async () => {
  const spec = await read("builtin://nano-maverick");
  const file = readFileSync(spec.files[0]?.path ?? "");
  const header = JSON.parse(file.toString("utf8", 8, 8 + Number(file.readBigUInt64LE(0))));
  const data = 8 + Number(file.readBigUInt64LE(0));
  const stored = header["model.layers.1.feed_forward.experts.gate_up_proj"];
  const up = plane(spec, TensorRole.EXPERT_UP, 1, 5);
  // Element (row 7, col 9) of expert 5's up projection is [5, in 9, 256 + 7] of the stored [8, 256, 512].
  const expected = data + stored.data_offsets[0] + 2 * (5 * 256 * 512 + 9 * 512 + 256 + 7);
  expect(Number(up.offset) + 2 * (9 * up.rowsStored + up.rowFirst + 7)).toBe(expected);
});

for (const [name, format] of [
  ["nano-maverick-q4_k_m", "GGUF Q4_K_M"],
  ["nano-maverick-q8_0", "GGUF Q8_0"],
]) {
  test(`${name} has the blocks, planes and shapes of the safetensors model`, async () => {
    const [plain, quantised] = [await read("builtin://nano-maverick"), await read(`builtin://${name}`)];
    expect(quantised.format).toBe(format);
    expect(quantised.blocks).toEqual(plain.blocks);
    expect(quantised.kvGroups).toEqual(plain.kvGroups);
    expect(quantised.stopIds).toEqual(plain.stopIds);
    for (const key of ["vocabSize", "hiddenSize", "contextTokens", "normEps", "bosId", "parameters"] as const)
      expect(quantised[key]).toEqual(plain[key]);
    const shapes = (spec: ModelSpec) =>
      spec.tensors.map((t) => [t.role, t.rule, t.block, t.expert, t.rows, t.cols].join(" ")).toSorted();
    expect(shapes(quantised)).toEqual(shapes(plain));
    expect(quantised.tensors.some((t) => t.transposed)).toBe(false);
  });
}

test("nano-maverick-q4_k_m mixes the types its recipe says, expert planes one after the other", async () => {
  const spec = await read("builtin://nano-maverick-q4_k_m");
  expect(plane(spec, TensorRole.HEAD).type).toBe(StoredType.Q6_K);
  expect(plane(spec, TensorRole.KEY, 0).type).toBe(StoredType.Q8_0);
  expect(plane(spec, TensorRole.OUTPUT, 0).type).toBe(StoredType.Q5_K);
  const [one, two] = [plane(spec, TensorRole.EXPERT_DOWN, 3, 1), plane(spec, TensorRole.EXPERT_DOWN, 3, 2)];
  expect(one.bytes).toBe(BigInt(256 * 210));
  expect(two.offset - one.offset).toBe(one.bytes);
});

test("llama: halves for safetensors, interleaved pairs for GGUF, the same frequencies", async () => {
  const [hf, gguf] = [await read("builtin://nano-draft"), await read("builtin://nano-draft-q8_0")];
  expect(hf.blocks[0]?.attention?.rope?.layout).toBe(RopeSpec_Layout.HALF);
  expect(gguf.blocks[0]?.attention?.rope?.layout).toBe(RopeSpec_Layout.INTERLEAVED);
  expect(gguf.blocks[0]?.attention?.rope?.frequencies).toEqual(hf.blocks[0]?.attention?.rope?.frequencies);
  expect(hf.blocks.every((block) => block.mlp?.$case === "dense")).toBe(true);
});

test("a tied head has no plane of its own", async () => {
  const tied = await read("file://./test/golden/llama-tied");
  expect(tied.tiedHead).toBe(true);
  expect(tied.tensors.some((t) => t.role === TensorRole.HEAD)).toBe(false);
  expect((await read("file://./test/golden/llama")).tensors.some((t) => t.role === TensorRole.HEAD)).toBe(true);
});

test("llama3 scaling: short waves stay, long ones are divided, the band between is blended", async () => {
  const spec = await read("file://./test/golden/llama");
  const found = spec.blocks[0]?.attention?.rope?.frequencies ?? [];
  const expected = Array.from({ length: 8 }, (_, j) => {
    const f = 500_000 ** (-j / 8);
    const wave = (2 * Math.PI) / f;
    if (wave < 64 / 4) return f;
    if (wave > 64 / 1) return f / 8;
    const s = (64 / wave - 1) / (4 - 1);
    return (1 - s) * (f / 8) + s * f;
  });
  expect(found).toHaveLength(8);
  for (const [j, value] of expected.entries()) expect(Math.abs((found[j] ?? 0) / value - 1)).toBeLessThan(1e-7);
});

test("equal low and high factors (Scout) leave no band to divide by", async () => {
  const spec = await read("file://./test/golden/llama4-scout");
  const found = spec.blocks[0]?.attention?.rope?.frequencies ?? [];
  for (const [j, value] of found.entries()) {
    const f = 500_000 ** (-j / 8);
    const expected = (2 * Math.PI) / f < 64 ? f : f / 16;
    expect(value).toBe(Math.fround(expected));
  }
});

test("golden Scout has qk-norm on rope layers only, golden Maverick none", async () => {
  const norms = async (name: string) =>
    (await read(`file://./test/golden/${name}`)).blocks.map((block) => block.attention?.qkUnitNorm);
  expect(await norms("llama4-scout")).toEqual([true, true, true, false]);
  expect(await norms("llama4-maverick")).toEqual([false, false, false, false]);
});

test("the digest is stable, and differs between models and formats", async () => {
  const digests = await Promise.all(
    ["nano-maverick", "nano-maverick", "nano-maverick-q8_0", "nano-draft"].map(
      async (name) => (await read(`builtin://${name}`)).digest,
    ),
  );
  expect(digests[0]).toBe(digests[1]);
  expect(new Set(digests).size).toBe(3);
  expect(digests[0]).toMatch(/^[0-9a-f]{64}$/);
});

test("sources that cannot be read say what to write instead", async () => {
  const say = async (source: string) => {
    const error = await read(source).catch((thrown: unknown) => thrown);
    return error instanceof FaultError ? error.message : String(error);
  };
  expect(await say("test/models/nano-draft")).toContain("write file://./test/models/nano-draft");
  expect(await say("/models/x")).toContain("write file:///models/x");
  expect(await say("file://models/x")).toContain("file:///absolute/path or file://./relative/path");
  expect(await say("file:///no/such/model")).toContain("/no/such/model does not exist");
  expect(await say("file:///tmp/50%-off")).toContain('"%" that begins no escape');
  expect(await say("https://example.com/%ff.gguf")).toContain('"%" that begins no escape');
  expect(await say("s3://bucket/x")).toContain("s3:// is not supported");
  expect(await say("builtin://nano")).toContain("there are nano-draft, nano-draft-q8_0, nano-maverick");
  expect(await say("hf://no-repository")).toContain("hf://org/name@revision");
  expect(await say("http://example.com/x.gguf")).toContain("only loopback may use http");
  expect(await say("file://./test/models/README.md")).toContain("neither a directory nor a .gguf file");
});
