// GGUF files that lie: each is refused with file, field and offset, and costs no more memory than the file has bytes.
import { expect, test } from "vitest";
import { parseGguf } from "../../../controller/model/gguf.ts";
import { readModel } from "../../../controller/model/model.ts";
import { FaultError } from "../../../proto/fault.ts";
import {
  array,
  bool,
  cacheDir,
  f32,
  folder,
  type GgufParts,
  gguf,
  ggufFile,
  ggufString,
  le32,
  le64,
  refusal,
  text,
  tinyKeys,
  tinyTensors,
  u32,
  u64,
  withKeys,
  withTensor,
} from "./craft.ts";

const tiny = (change: Partial<GgufParts> = {}): Buffer => gguf({ keys: tinyKeys, tensors: tinyTensors, ...change });
const say = (change: Partial<GgufParts>): Promise<string> => refusal(ggufFile(tiny(change)));

test("the file that the others break is read", async () => {
  const spec = await readModel(ggufFile(tiny()), { cacheDir });
  expect(spec).toMatchObject({ family: "llama", tiedHead: true, vocabSize: 12, parameters: 696n });
});

test("version 2 has the same layout", async () => {
  expect((await readModel(ggufFile(tiny({ version: 2 })), { cacheDir })).family).toBe("llama");
});

const HUGE = 2n ** 60n;
const OFFSET = /at byte \d+/;
const CASES: [string, Partial<GgufParts>, string][] = [
  ["another magic", { magic: "GGML" }, "x.gguf/magic: this is not a GGUF file"],
  ["version 1", { version: 1 }, "x.gguf/version: 1 is not supported"],
  ["big-endian version", { version: 0x03000000 }, "x.gguf/version: 50331648 is not supported"],
  ["2^60 tensors", { tensorCount: HUGE }, "x.gguf/tensor count: 1152921504606846976 is more than"],
  ["more tensors than the file can hold", { tensorCount: 900_000n }, "do not fit into"],
  ["2^64-1 keys", { keyCount: 2n ** 64n - 1n }, "x.gguf/key count: 18446744073709551615 is more than"],
  [
    "a key count one too high",
    { keyCount: BigInt(tinyKeys.length + 1) },
    "x.gguf/tensor 0 name: 3377699720527872 is more than",
  ],
  ["a tensor count one too high", { tensorCount: 12n, dataBytes: 0 }, "x.gguf/tensor 11 name"],
  [
    "a key that appears twice",
    { keys: [...tinyKeys, ["llama.vocab_size", u32(12)]] },
    "llama.vocab_size: appears twice",
  ],
  [
    "an unknown value type",
    { keys: [...tinyKeys, ["x", { type: 99, bytes: le32(0) }]] },
    "x: has the unknown value type 99",
  ],
  ["an unknown item type", { keys: [...tinyKeys, ["x", array(77, [])]] }, "x: has the unknown item type 77"],
  [
    "an array of 2^60 items",
    { keys: [...tinyKeys, ["x", array(4, [], HUGE)]] },
    "x.gguf/x: 1152921504606846976 is more",
  ],
  ["an array longer than the file", { keys: [...tinyKeys, ["x", array(4, [], 100_000n)]] }, "x: claims 100000 items"],
  [
    "arrays in arrays in arrays",
    { keys: [...tinyKeys, ["x", array(9, [array(9, [array(9, []).bytes]).bytes])]] },
    "x: arrays are nested deeper than 2",
  ],
  [
    "a string of 2^60 bytes",
    { keys: [...tinyKeys, ["x", { type: 8, bytes: le64(HUGE) }]] },
    "x.gguf/x: 1152921504606846976",
  ],
  [
    "a string that runs over the end",
    { keys: [...tinyKeys, ["x", { type: 8, bytes: le64(1_000_000n) }]] },
    "x: the file ends at byte",
  ],
  [
    "a key name of 2 KB",
    { keys: [...tinyKeys, ["k".repeat(2048), u32(1)]] },
    "x.gguf/key 9: 2048 is more than the 1024",
  ],
  ["alignment 0", { keys: [...tinyKeys, ["general.alignment", u32(0)]] }, "general.alignment: must be a power of two"],
  [
    "alignment 48",
    { keys: [...tinyKeys, ["general.alignment", u32(48)]] },
    "general.alignment: must be a power of two",
  ],
  [
    "alignment as text",
    { keys: [...tinyKeys, ["general.alignment", text("32")]] },
    "general.alignment: must be a power",
  ],
  ["five dimensions", { tensors: withTensor("output_norm.weight", { ne: [8, 1, 1, 1, 1] }) }, "has 5 dimensions"],
  ["no dimensions", { tensors: withTensor("output_norm.weight", { ne: [] }) }, "output_norm.weight: has 0 dimensions"],
  [
    "a dimension of 0",
    { tensors: withTensor("output_norm.weight", { ne: [0] }) },
    "output_norm.weight: dimension 0 is 0",
  ],
  [
    "a dimension of 2^60",
    { tensors: withTensor("output_norm.weight", { ne: [HUGE], bytes: 32 }) },
    "x.gguf/output_norm.weight dimension 0: 1152921504606846976 is more",
  ],
  [
    "dimensions whose product overflows",
    { tensors: withTensor("output_norm.weight", { ne: [2n ** 40n, 2n ** 40n], bytes: 32 }) },
    "output_norm.weight: F32 [1099511627776, 1099511627776] from byte",
  ],
  ["an unknown tensor type", { tensors: withTensor("output_norm.weight", { type: 200 }) }, "has the unknown type 200"],
  [
    "a type of no kernel",
    { tensors: withTensor("blk.0.attn_q.weight", { type: 26 }) },
    "stored type I32 is not supported",
  ],
  [
    "rows that do not fill blocks",
    { tensors: withTensor("blk.0.attn_q.weight", { type: 8 }) },
    "rows of 8 do not divide",
  ],
  [
    "a misaligned offset",
    { tensors: withTensor("output_norm.weight", { offset: 7 }) },
    "offset 7 is not a multiple of 32",
  ],
  [
    "an offset beyond the file",
    { tensors: withTensor("output_norm.weight", { offset: 1 << 20 }) },
    "does not fit into",
  ],
  [
    "tensors that overlap",
    { tensors: withTensor("output_norm.weight", { offset: 0 }) },
    "overlaps the tensor before it",
  ],
  [
    "a tensor that appears twice",
    { tensors: [...tinyTensors, { name: "output_norm.weight", ne: [8] }] },
    "appears twice",
  ],
  ["a tensor without a name", { tensors: [...tinyTensors, { name: "", ne: [8] }] }, "x.gguf/tensor 11 name: is empty"],
  ["data cut off", { dataBytes: 100 }, "the file is truncated or the header lies"],
  [
    "a wrong shape",
    { tensors: withTensor("blk.0.attn_k.weight", { ne: [8, 8] }) },
    "has shape [8, 8], the configuration implies [4, 8]",
  ],
  [
    "a bias nobody adds",
    { tensors: [...tinyTensors, { name: "blk.0.attn_q.bias", ne: [8] }] },
    "blk.0.attn_q.bias: family llama has no use",
  ],
  [
    "no layers",
    { keys: withKeys({ "llama.block_count": u32(0) }) },
    "llama.block_count: must be an integer of 1..1024, is 0",
  ],
  [
    "a million layers",
    { keys: withKeys({ "llama.block_count": u32(1_000_000) }) },
    "llama.block_count: must be an integer",
  ],
  [
    "layers as text",
    { keys: withKeys({ "llama.block_count": text("1") }) },
    'llama.block_count: must be an integer of 1..1024, is "1"',
  ],
  [
    "a size beyond exact integers",
    { keys: withKeys({ "llama.embedding_length": u64(2n ** 63n) }) },
    "llama.embedding_length: must be an integer",
  ],
  [
    "a fraction of a head",
    { keys: withKeys({ "llama.attention.head_count": f32(2.5) }) },
    "head_count: must be an integer of 1..4096, is 2.5",
  ],
  [
    "heads for each layer",
    { keys: withKeys({ "llama.attention.head_count_kv": array(4, [le32(1)]) }) },
    "head_count_kv: must be an integer",
  ],
  [
    "kv heads that do not divide",
    { keys: withKeys({ "llama.attention.head_count_kv": u32(3) }) },
    "2 query heads do not divide over 3 kv heads",
  ],
  [
    "an eps that is no number",
    { keys: withKeys({ "llama.attention.layer_norm_rms_epsilon": f32(Number.NaN) }) },
    "epsilon: must be a number of 0..0.1, is NaN",
  ],
  [
    "a negative theta",
    { keys: withKeys({ "llama.rope.freq_base": f32(-1) }) },
    "rope.freq_base: must be a number of 1..1000000000000, is -1",
  ],
  ["yarn", { keys: withKeys({ "llama.rope.scaling.type": text("yarn") }) }, 'rope scaling "yarn" is not supported'],
  [
    "experts in architecture llama",
    { keys: withKeys({ "llama.expert_count": u32(8) }) },
    "(Mixtral) are not supported",
  ],
  [
    "an unknown architecture",
    { keys: withKeys({ "general.architecture": text("mamba") }) },
    'architecture "mamba" is not supported',
  ],
];

for (const [what, change, message] of CASES)
  test(`${what} is refused`, async () => {
    const said = await say(change);
    expect(said).toContain(message);
    expect(said).toContain("x.gguf");
    expect(said).toMatch(OFFSET);
  });

const WITHOUT_OFFSET: [string, Partial<GgufParts>, string][] = [
  [
    "a missing tensor",
    { tensors: tinyTensors.filter((t) => t.name !== "blk.0.ffn_up.weight") },
    "x.gguf/blk.0.ffn_up.weight: is missing; expected shape [16, 8]",
  ],
  [
    "a missing key",
    { keys: withKeys({ "llama.feed_forward_length": undefined }) },
    "x.gguf/llama.feed_forward_length: is missing",
  ],
  [
    "no architecture",
    { keys: withKeys({ "general.architecture": undefined }) },
    "x.gguf/general.architecture: is missing",
  ],
];
for (const [what, change, message] of WITHOUT_OFFSET)
  test(`${what} is refused`, async () => expect(await say(change)).toContain(message));

test("a file cut at any byte of its header is refused, naming where it ends", () => {
  const whole = tiny();
  const header = parseGguf(whole, "x.gguf", whole.length);
  if (!("headerBytes" in header)) throw new Error("the whole file was not read");
  for (let length = 0; length < header.headerBytes; length++) {
    let said = "";
    try {
      parseGguf(whole.subarray(0, length), "x.gguf", length);
    } catch (error) {
      if (!(error instanceof FaultError)) throw error;
      said = error.message;
    }
    expect(said, `cut at ${length}`).toMatch(/x\.gguf.*at byte \d+/);
  }
});

test("a header longer than the first read is read in larger pieces", async () => {
  const tokens = Array.from({ length: 120_000 }, (_, i) => ggufString(`token-${i}-${"x".repeat(10)}`));
  const keys: GgufParts["keys"] = [
    ...tinyKeys,
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.tokens", array(8, tokens)],
    ["tokenizer.ggml.merges", array(8, [])],
  ];
  const bytes = tiny({ keys });
  expect(bytes.length).toBeGreaterThan(3 * 1024 * 1024);
  const spec = await readModel(ggufFile(bytes), { cacheDir });
  expect(spec.tokenizer?.vocabHash).toBeGreaterThan(0n);
});

test("lying counts cost no memory", async () => {
  const before = process.memoryUsage().rss;
  for (let i = 0; i < 50; i++) {
    await say({ tensorCount: 999_999n });
    await say({ keys: [...tinyKeys, ["x", array(0, [], 3_999_999n)]] });
    await say({ keys: [...tinyKeys, ["x", { type: 8, bytes: le64(16_000_000n) }]] });
  }
  expect(process.memoryUsage().rss - before).toBeLessThan(200 * 1024 * 1024);
});

const factors = (values: number[]): GgufParts => {
  const keys = tinyKeys;
  const tensors = [...tinyTensors, { name: "rope_freqs.weight", ne: [values.length] }];
  const bytes = gguf({ keys, tensors });
  for (const [i, value] of values.entries()) bytes.writeFloatLE(value, bytes.length - 32 + 4 * i);
  return { keys, tensors, magic: bytes.toString("latin1") };
};
const factorFile = (values: number[]) => ggufFile(Buffer.from(factors(values).magic ?? "", "latin1"));

test("linear scaling divides every frequency, under either key", async () => {
  const plain = Math.fround(10_000 ** -0.5 / 4);
  for (const keys of [
    withKeys({ "llama.rope.scaling.type": text("linear"), "llama.rope.scaling.factor": f32(4) }),
    withKeys({ "llama.rope.scale_linear": f32(4) }),
  ])
    expect((await readModel(ggufFile(tiny({ keys })), { cacheDir })).blocks[0]?.attention?.rope?.frequencies).toEqual([
      0.25,
      plain,
    ]);
});

test("a path with a percent sign is read by its canonical URL too", async () => {
  const path = folder({ "50%.gguf": tiny() });
  const spec = await readModel(`file://${path}/50%25.gguf`, { cacheDir });
  expect(spec.source).toBe(`file://${path}/50%25.gguf`);
  expect((await readModel(spec.source, { cacheDir })).digest).toBe(spec.digest);
});

test("rope_freqs divide the frequencies", async () => {
  const spec = await readModel(factorFile([1, 4]), { cacheDir });
  const found = spec.blocks[0]?.attention?.rope?.frequencies;
  expect(found).toEqual([1, Math.fround(10_000 ** -0.5 / 4)]);
});

test("rope_freqs that are zero, not numbers or too many are refused", async () => {
  expect(await refusal(factorFile([1, 0]))).toMatch(/rope_freqs.weight: value 1 is 0.*at byte/);
  expect(await refusal(factorFile([Number.NaN, 1]))).toMatch(/rope_freqs.weight: value 0 is NaN/);
  expect(await refusal(factorFile([1, 1, 1]))).toContain("has 3 values, 2 are needed");
});

test("a flag that is no flag is refused", async () => {
  const keys: GgufParts["keys"] = [
    ...tinyKeys,
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.tokens", array(8, [ggufString("a")])],
    ["tokenizer.ggml.add_bos_token", u32(1)],
  ];
  expect(await say({ keys })).toMatch(/add_bos_token: must be true or false, is 1 \(at byte \d+\)/);
  const fine = keys.map(([key, value]): [string, typeof value] => [
    key,
    key.endsWith("add_bos_token") ? bool(true) : value,
  ]);
  expect((await readModel(ggufFile(tiny({ keys: fine })), { cacheDir })).tokenizer?.addBos).toBe(false);
});
