// Safetensors headers, indexes and configurations that lie: each is refused with file, key and offset.
import { truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { cacheDir, folder, refusal, safetensors, TINY_SHAPES, tinyConfig, tinyFolder, tinyHeader } from "./craft.ts";

const { header, bytes } = tinyHeader();
const read = (path: string) => readModel(`file://${path}`, { cacheDir });
const withFile = (file: Uint8Array): Promise<string> => refusal(`file://${tinyFolder({}, file)}`);
/** The tiny header with one tensor's entry changed. */
const changed = (name: string, change: object): Buffer =>
  safetensors({ ...header, [name]: { ...header[name], ...change } }, bytes);
const NORM = "model.norm.weight";
const at = (name: string): [number, number] => header[name]?.data_offsets ?? [0, 0];

test("the file that the others break is read", async () => {
  expect(await read(tinyFolder())).toMatchObject({ family: "llama", parameters: 792n, format: "safetensors F32" });
});

const HEADERS: [string, Buffer, string][] = [
  ["an empty file", Buffer.alloc(0), "model.safetensors: has 0 bytes, too short"],
  ["seven bytes", Buffer.alloc(7), "model.safetensors: has 7 bytes, too short"],
  ["a header of 2^63 bytes", safetensors(header, bytes, 2n ** 63n), "header length: 9223372036854775808 is more than"],
  ["a header of 100,000,001 bytes", safetensors(header, bytes, 100_000_001n), "header length: 100000001 is more than"],
  ["a header longer than the file", safetensors(header, bytes, 99_999_999n), "header length: 99999999 goes beyond"],
  [
    "a header one byte too short",
    safetensors(header, bytes, BigInt(JSON.stringify(header).length - 1)),
    "not valid JSON: it ends too early",
  ],
  ["a header that is an array", safetensors("[]", 0), "model.safetensors: must be a JSON object"],
  ["an empty header", safetensors("", 0), "not valid JSON: it ends too early"],
  ["a header with a comma too many", safetensors('{"a":1,}', 0), "not valid JSON: expected"],
  ["something after the header", safetensors("{} x", 0), "something follows the value"],
  ["a key that appears twice", safetensors('{"a":{},"a":{}}', 0), 'key "a" appears twice'],
  ["NaN as a value", safetensors('{"a":NaN}', 0), '"NaN" is not a value'],
  ["an infinite number", safetensors('{"a":1e999}', 0), '"1e999" is not a value'],
  ["a string that does not end", safetensors('{"abc', 0), "a string does not end"],
  ["a bad escape", safetensors('{"a\\x":1}', 0), "unknown escape"],
  ["bytes that are not UTF-8", safetensors(Buffer.from([0x7b, 0x22, 0xff, 0x22]), 0), "a string is not UTF-8"],
  ["a thousand brackets", safetensors(`{"a":${"[".repeat(1000)}`, 0), "nested deeper than 32"],
  ["a tensor that is a number", safetensors({ ...header, x: { dtype: 1 } }, bytes), "x.dtype: must be a string, is 1"],
  ["a tensor that is text", safetensors('{"x":"y"}', 0), "model.safetensors/x: must be an object"],
  ["an unknown dtype", changed(NORM, { dtype: "F33" }), `${NORM}.dtype: "F33" is not a known dtype`],
  ["a dtype of no kernel", changed(NORM, { dtype: "I32" }), `${NORM}: stored type I32 is not supported`],
  ["a negative dimension", changed(NORM, { shape: [-8] }), `${NORM}.shape: item 0 must be an integer of 0..`],
  ["half a dimension", changed(NORM, { shape: [8.5] }), "item 0 must be an integer of 0..9007199254740991, is 8.5"],
  [
    "a dimension that is text",
    changed(NORM, { shape: ["8"] }),
    'item 0 must be an integer of 0..9007199254740991, is "8"',
  ],
  ["a shape that overflows", changed(NORM, { shape: [2 ** 50, 2 ** 50] }), `${NORM}.data_offsets: 32 bytes, but F32`],
  ["nine dimensions", changed(NORM, { shape: [8, 1, 1, 1, 1, 1, 1, 1, 1] }), "must have at most 8 items, has 9"],
  ["one offset", changed(NORM, { data_offsets: [0] }), `${NORM}.data_offsets: must be two integers`],
  ["three offsets", changed(NORM, { data_offsets: [0, 1, 2] }), `${NORM}.data_offsets: must have at most 2 items`],
  ["offsets the wrong way round", changed(NORM, { data_offsets: [416, 384] }), "end 384 lies before begin 416"],
  [
    "offsets beyond exact integers",
    changed(NORM, { data_offsets: [0, 2 ** 60] }),
    `${NORM}.data_offsets: item 1 must be`,
  ],
  ["bytes that do not match the shape", changed(NORM, { shape: [7] }), `${NORM}.data_offsets: 32 bytes, but F32 [7]`],
  [
    "tensors that overlap",
    changed(NORM, { data_offsets: [at(NORM)[0] - 8, at(NORM)[1] - 8] }),
    "overlaps the tensor before it",
  ],
  [
    "a gap between tensors",
    changed(NORM, { data_offsets: [at(NORM)[0] + 8, at(NORM)[1] + 8] }),
    "leaves a gap before it",
  ],
  ["data cut off", safetensors(header, bytes - 4), "its header describes"],
  ["data too long", safetensors(header, bytes + 4), "its header describes"],
  [
    "a wrong shape",
    changed("model.layers.0.mlp.up_proj.weight", { shape: [8, 16] }),
    "mlp.up_proj.weight: has shape [8, 16], the configuration implies [16, 8]",
  ],
];
for (const [what, file, message] of HEADERS)
  test(`a safetensors file with ${what} is refused`, async () => {
    const said = await withFile(file);
    expect(said).toContain(message);
    expect(said).toContain("model.safetensors");
    expect(said).toMatch(/at byte \d+/);
  });

const shapesWithout = (name: string) => TINY_SHAPES.filter(([tensor]) => tensor !== name);
const from = (shapes: typeof TINY_SHAPES): Buffer => {
  const made = tinyHeader(shapes);
  return safetensors(made.header, made.bytes);
};

test("a missing tensor is named with the shape that was expected", async () => {
  const said = await withFile(from(shapesWithout("model.layers.0.self_attn.o_proj.weight")));
  expect(said).toContain("model.safetensors/model.layers.0.self_attn.o_proj.weight: is missing; expected shape [8, 8]");
});

test("a head that is missing though it is not tied is named", async () => {
  expect(await withFile(from(shapesWithout("lm_head.weight")))).toContain("lm_head.weight: is missing");
});

test("a tensor that nobody uses is refused, stray rotary tables are not", async () => {
  const bias: (typeof TINY_SHAPES)[number] = ["model.layers.0.self_attn.q_proj.bias", [8]];
  expect(await withFile(from([...TINY_SHAPES, bias]))).toMatch(/q_proj.bias: family llama has no use.*at byte \d+/);
  const stray: (typeof TINY_SHAPES)[number] = ["model.layers.0.self_attn.rotary_emb.inv_freq", [2]];
  expect(await read(tinyFolder({}, from([...TINY_SHAPES, stray])))).toMatchObject({ parameters: 792n });
});

test("a file cut at any of its first bytes is refused", async () => {
  const path = tinyFolder();
  const file = join(path, "model.safetensors");
  const whole = safetensors(header, bytes);
  const cuts = [...Array(64).keys(), whole.length - bytes - 1, whole.length - bytes, whole.length - 1];
  for (const length of cuts) {
    writeFileSync(file, whole);
    truncateSync(file, length);
    expect(await refusal(`file://${path}`), `cut at ${length}`).toMatch(/model\.safetensors.*at byte \d+/);
  }
});

const CONFIGS: [string, Record<string, unknown>, string][] = [
  ["a hidden size of 0", { hidden_size: 0 }, "hidden_size: must be an integer of 1..16777216, is 0"],
  ["a negative layer count", { num_hidden_layers: -3 }, "num_hidden_layers: must be an integer of 1..1024, is -3"],
  ["2^53 layers", { num_hidden_layers: 2 ** 53 }, "num_hidden_layers: must be an integer of 1..1024"],
  ["half a head", { num_attention_heads: 2.5 }, "num_attention_heads: must be an integer of 1..4096, is 2.5"],
  ["a vocabulary that is text", { vocab_size: "12" }, 'vocab_size: must be an integer of 1..16777216, is "12"'],
  [
    "heads as an array",
    { num_attention_heads: [2] },
    "num_attention_heads: must be an integer of 1..4096, is an array of 1",
  ],
  [
    "kv heads that do not divide",
    { num_key_value_heads: 3 },
    "num_key_value_heads: 2 query heads do not divide over 3",
  ],
  ["an odd head dimension", { head_dim: 5 }, "head_dim: the head dimension must be even, is 5"],
  ["an eps of 1", { rms_norm_eps: 1 }, "rms_norm_eps: must be a number of 0..0.1, is 1"],
  ["attention biases", { attention_bias: true }, "attention_bias: biases are not supported in family llama"],
  ["MLP biases", { mlp_bias: true }, "mlp_bias: biases are not supported in family llama"],
  ["another activation", { hidden_act: "gelu" }, 'hidden_act: activation "gelu" is not supported'],
  ["a tie that is a number", { tie_word_embeddings: 1 }, "tie_word_embeddings: must be true or false, is 1"],
  [
    "another scaling",
    { rope_scaling: { rope_type: "yarn", factor: 4 } },
    'rope_scaling.rope_type: rope scaling "yarn" is not supported',
  ],
  ["scaling that is text", { rope_scaling: "llama3" }, 'rope_scaling: must be an object, is "llama3"'],
  ["scaling by 0", { rope_scaling: { rope_type: "linear", factor: 0 } }, "rope_scaling.factor: must be a number"],
  ["a theta of 0", { rope_theta: 0 }, "rope_theta: must be a number of 1..1000000000000, is 0"],
  [
    "an unknown architecture",
    { architectures: ["XForCausalLM"] },
    'architectures: architecture "XForCausalLM" is not supported',
  ],
  ["an unknown model type", { architectures: null, model_type: "x" }, 'model_type: model_type "x" is not supported'],
  ["architectures that are no texts", { architectures: [7] }, "architectures: item 0 must be a string, is 7"],
  ["a stop id that is text", { eos_token_id: ["</s>"] }, "eos_token_id: item 0 must be an integer of 0..16777216"],
  ["a negative stop id", { eos_token_id: -1 }, "eos_token_id: must be an integer of 0..16777216, is -1"],
  [
    "a shape that the file has not",
    { intermediate_size: 32 },
    "mlp.gate_proj.weight: has shape [16, 8], the configuration implies [32, 8]",
  ],
];
for (const [what, change, message] of CONFIGS)
  test(`a config.json with ${what} is refused`, async () => {
    const said = await refusal(`file://${tinyFolder(change)}`);
    expect(said).toContain(message);
    expect(said).toMatch(/^(config\.json|model\.safetensors)\//);
    if (!message.includes("is not supported")) expect(said).toMatch(/at byte \d+/);
  });

test("a missing key is named", async () => {
  const { hidden_size: _, ...rest } = tinyConfig;
  expect(await refusal(`file://${folder({ "config.json": JSON.stringify(rest) })}`)).toBe(
    "config.json/hidden_size: is missing",
  );
});

const LLAMA4 = {
  ...{
    model_type: "llama4_text",
    hidden_size: 8,
    intermediate_size: 8,
    num_attention_heads: 2,
    num_key_value_heads: 1,
  },
  ...{ num_hidden_layers: 2, vocab_size: 12, num_local_experts: 4, num_experts_per_tok: 1 },
};
const LLAMA4_CASES: [string, Record<string, unknown>, string][] = [
  [
    "more experts a token than there are",
    { num_experts_per_tok: 5 },
    "num_experts_per_tok: 5 experts per token, but there are 4",
  ],
  [
    "a rope list of another length",
    { no_rope_layers: [1] },
    "no_rope_layers: must have one item for each of 2 layers, has 1",
  ],
  ["a rope list of twos", { no_rope_layers: [1, 2] }, "no_rope_layers: item 1 must be an integer of 0..1, is 2"],
  ["experts in a layer that is not there", { moe_layers: [2] }, "moe_layers: item 0 must be an integer of 0..1, is 2"],
  [
    "an unknown kind of layer",
    { layer_types: ["sliding_attention", "full_attention"] },
    'layer 0 is "sliding_attention"',
  ],
  ["chunks of nothing", { attention_chunk_size: 0 }, "attention_chunk_size: must be an integer of 1..1000000000, is 0"],
  ["another quantisation", { quantization_config: { quant_method: "awq" } }, 'quantisation "awq" cannot be planned'],
];
for (const [what, change, message] of LLAMA4_CASES)
  test(`a llama4 config.json with ${what} is refused`, async () =>
    expect(await refusal(`file://${folder({ "config.json": JSON.stringify({ ...LLAMA4, ...change }) })}`)).toContain(
      message,
    ));

test("a directory with nothing, or with several GGUF files, says what to name", async () => {
  expect(await refusal(`file://${folder({})}`)).toContain("has no config.json; for a GGUF model name the .gguf file");
  expect(await refusal(`file://${folder({ "a.gguf": "", "b.gguf": "" })}`)).toContain("name one of a.gguf, b.gguf");
});

const halves = () => {
  const [one, two] = [tinyHeader(TINY_SHAPES.slice(0, 6)), tinyHeader(TINY_SHAPES.slice(6))];
  const map = Object.fromEntries(TINY_SHAPES.map(([name], i) => [name, i < 6 ? "a-1.safetensors" : "a-2.safetensors"]));
  return {
    map,
    files: {
      "config.json": JSON.stringify(tinyConfig),
      "a-1.safetensors": safetensors(one.header, one.bytes),
      "a-2.safetensors": safetensors(two.header, two.bytes),
    },
  };
};
const indexed = (index: unknown, change: Record<string, Buffer> = {}) => {
  const text = typeof index === "string" ? index : JSON.stringify(index);
  return folder({ ...halves().files, ...change, "model.safetensors.index.json": text });
};

test("shards of an index are one checkpoint", async () => {
  const spec = await read(indexed({ weight_map: halves().map }));
  expect(spec.files.map((file) => file.name)).toEqual(["a-1.safetensors", "a-2.safetensors"]);
  expect(spec.parameters).toBe(792n);
});

const INDEXES: [string, () => string, string][] = [
  ["bad JSON", () => indexed("{"), "index.json: not valid JSON: it ends too early (at byte 1)"],
  ["no weight map", () => indexed({ metadata: {} }), "index.json/weight_map: is missing"],
  [
    "a weight map that is an array",
    () => indexed({ weight_map: [] }),
    "weight_map: must be an object, is an array of 0 (at byte 14)",
  ],
  ["a file that is a number", () => indexed({ weight_map: { x: 1 } }), "weight_map.x: must be a string, is 1"],
  [
    "a path out of the directory",
    () => indexed({ weight_map: { x: "../../etc/passwd.safetensors" } }),
    "is not the name of a .safetensors file",
  ],
  [
    "a shard that is not there",
    () => indexed({ weight_map: { ...halves().map, x: "a-3.safetensors" } }),
    "a-3.safetensors does not exist",
  ],
  [
    "a tensor that is not there",
    () => indexed({ weight_map: { ...halves().map, x: "a-1.safetensors" } }),
    "a-1.safetensors/x: is missing",
  ],
  [
    "a tensor in another shard",
    () => indexed({ weight_map: { ...halves().map, "model.norm.weight": "a-2.safetensors" } }),
    "names a-2.safetensors, but the tensor is in a-1.safetensors",
  ],
  [
    "a tensor in two shards",
    () => indexed({ weight_map: halves().map }, { "a-2.safetensors": safetensors(header, bytes) }),
    "is also in a-1.safetensors",
  ],
  [
    "a tensor left out",
    () => indexed({ weight_map: Object.fromEntries(Object.entries(halves().map).slice(1)) }),
    "is not named in model.safetensors.index.json",
  ],
];
for (const [what, make, message] of INDEXES)
  test(`an index with ${what} is refused`, async () => expect(await refusal(`file://${make()}`)).toContain(message));

test("tokenizer files that are broken are refused by name", async () => {
  const path = tinyFolder();
  const say = async (name: string, text: string) => {
    writeFileSync(join(path, name), text);
    return refusal(`file://${path}`);
  };
  expect(await say("tokenizer.json", "{")).toContain("tokenizer.json: not valid JSON: it ends too early (at byte 1)");
  expect(await say("tokenizer.json", "{}")).toContain("tokenizer.json/model: is missing");
  expect(await say("tokenizer.json", '{"model":{"vocab":{"a":-1}}}')).toContain(
    "tokenizer.json/model.vocab: ids must be integers",
  );
  writeFileSync(join(path, "tokenizer.json"), '{"model":{"vocab":{"a":0}}}');
  expect(await say("tokenizer_config.json", '{"bos_token":7}')).toContain("bos_token: must be an object, is 7");
  expect(await say("tokenizer_config.json", '{"chat_template":[1]}')).toContain(
    "chat_template: its items must be objects",
  );
});
