// The ways in which exporters write Llama 4: nested under language_model with vision beside it, experts fused or one by one.
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { shardsOf, slicesOf } from "../../../controller/model/shards.ts";
import { type ModelSpec, ShardRule, StoredType, TensorRole } from "../../../proto/gen/muster/v1/plan.ts";
import { cacheDir, folder, refusal, safetensors } from "./craft.ts";

const [HIDDEN, FFN, EXPERTS, VOCAB] = [8, 6, 3, 12];
const TEXT = {
  ...{ model_type: "llama4_text", hidden_size: HIDDEN, intermediate_size: FFN, intermediate_size_mlp: 10 },
  ...{ num_attention_heads: 2, num_key_value_heads: 1, num_hidden_layers: 4, vocab_size: VOCAB, head_dim: 4 },
  ...{ num_local_experts: EXPERTS, num_experts_per_tok: 1, interleave_moe_layer_step: 2, attention_chunk_size: 16 },
  ...{ attn_temperature_tuning: 4, bos_token_id: 1, eos_token_id: [2, 3], use_qk_norm: false },
};
const NESTED = { architectures: ["Llama4ForConditionalGeneration"], model_type: "llama4", text_config: TEXT };

type Shapes = [string, number[]][];

function attention(layer: string): Shapes {
  return [
    [`${layer}.input_layernorm.weight`, [HIDDEN]],
    [`${layer}.post_attention_layernorm.weight`, [HIDDEN]],
    [`${layer}.self_attn.q_proj.weight`, [8, HIDDEN]],
    [`${layer}.self_attn.k_proj.weight`, [4, HIDDEN]],
    [`${layer}.self_attn.v_proj.weight`, [4, HIDDEN]],
    [`${layer}.self_attn.o_proj.weight`, [HIDDEN, 8]],
  ];
}

const ffn = (path: string, width: number): Shapes => [
  [`${path}.gate_proj.weight`, [width, HIDDEN]],
  [`${path}.up_proj.weight`, [width, HIDDEN]],
  [`${path}.down_proj.weight`, [HIDDEN, width]],
];

function moe(path: string, isFused: boolean): Shapes {
  const fused: Shapes = [
    [`${path}.experts.gate_up_proj`, [EXPERTS, HIDDEN, 2 * FFN]],
    [`${path}.experts.down_proj`, [EXPERTS, FFN, HIDDEN]],
  ];
  const separate = Array.from({ length: EXPERTS }, (_, e) => ffn(`${path}.experts.${e}`, FFN)).flat();
  return [
    [`${path}.router.weight`, [EXPERTS, HIDDEN]],
    ...ffn(`${path}.shared_expert`, FFN),
    ...(isFused ? fused : separate),
  ];
}

function shapesOf(prefix: string, isFused: boolean): Shapes {
  const layers = Array.from({ length: 4 }, (_, i) => {
    const layer = `${prefix}model.layers.${i}`;
    return [...attention(layer), ...(i % 2 ? moe(`${layer}.feed_forward`, isFused) : ffn(`${layer}.feed_forward`, 10))];
  });
  return [
    [`${prefix}model.embed_tokens.weight`, [VOCAB, HIDDEN]],
    [`${prefix}model.norm.weight`, [HIDDEN]],
    [`${prefix}lm_head.weight`, [VOCAB, HIDDEN]],
    ...layers.flat(),
  ];
}

function write(config: object, shapes: Shapes, typeOf: (name: string) => "BF16" | "F8_E4M3" = () => "BF16"): string {
  let at = 0;
  const header = Object.fromEntries(
    shapes.map(([name, shape]) => {
      const begin = at;
      at += shape.reduce((a, b) => a * b, typeOf(name) === "BF16" ? 2 : 1);
      return [name, { dtype: typeOf(name), shape, data_offsets: [begin, at] as [number, number] }];
    }),
  );
  return `file://${folder({ "config.json": JSON.stringify(config), "model.safetensors": safetensors(header, at) })}`;
}

const read = (source: string): Promise<ModelSpec> => readModel(source, { cacheDir });
const VISION: Shapes = [
  ["vision_model.class_embedding", [5]],
  ["vision_model.patch_embedding.linear.weight", [5, 7]],
  ["multi_modal_projector.linear_1.weight", [HIDDEN, 5]],
];

test("the text model of a nested checkpoint is the plain one; vision is counted as bytes, not as parameters", async () => {
  const plain = await read(write(TEXT, shapesOf("", true)));
  const nested = await read(write(NESTED, [...VISION, ...shapesOf("language_model.", true)]));
  expect(nested.blocks).toEqual(plain.blocks);
  expect(nested.parameters).toBe(plain.parameters);
  expect(nested.stopIds).toEqual([2, 3]);
  const others = nested.tensors.filter((tensor) => tensor.role === TensorRole.OTHER);
  expect(others.map(({ name, rule, bytes }) => [name, rule, bytes])).toEqual([
    ["vision_model.class_embedding", ShardRule.UNSPECIFIED, 10n],
    ["vision_model.patch_embedding.linear.weight", ShardRule.UNSPECIFIED, 70n],
    ["multi_modal_projector.linear_1.weight", ShardRule.UNSPECIFIED, 80n],
  ]);
});

test("no rank loads vision", async () => {
  const model = await read(write(NESTED, [...VISION, ...shapesOf("language_model.", true)]));
  const cut = { world: 2, tp: 2, dp: 1, ep: 1, etp: 2, pp: 1 };
  const plan = {
    ...{ revision: "", model, cut, ranks: shardsOf(model, cut, 1), ledgers: [], reasons: [], workers: 1 },
    ...{ contextTokens: 0, kvBlockTokens: 16, kvBlocks: 0, expertCopies: 0 },
  };
  const loaded = new Set(slicesOf(plan, 0).map((slice) => model.tensors[slice.tensor]?.role));
  expect(loaded.has(TensorRole.EXPERT_DOWN)).toBe(true);
  expect(loaded.has(TensorRole.OTHER)).toBe(false);
});

test("experts one by one mean the same planes, not transposed", async () => {
  const [fused, separate] = [await read(write(TEXT, shapesOf("", true))), await read(write(TEXT, shapesOf("", false)))];
  expect(separate.blocks).toEqual(fused.blocks);
  expect(separate.parameters).toBe(fused.parameters);
  const planes = (spec: ModelSpec) => spec.tensors.map((t) => [t.role, t.block, t.expert, t.rows, t.cols].join(" "));
  expect(planes(separate)).toEqual(planes(fused));
  expect(fused.tensors.filter((t) => t.transposed)).toHaveLength(2 * EXPERTS * 3);
  expect(separate.tensors.some((t) => t.transposed)).toBe(false);
});

test("a truthy number turns temperature tuning on, 0 and false turn it off", async () => {
  const scales = async (value: unknown) =>
    (await read(write({ ...TEXT, attn_temperature_tuning: value }, shapesOf("", true)))).blocks.map(
      (block) => block.attention?.temperatureScale,
    );
  expect(await scales(4)).toEqual([0, 0, 0, 0.1]);
  expect(await scales(true)).toEqual([0, 0, 0, 0.1]);
  expect(await scales(0)).toEqual([0, 0, 0, 0]);
  expect(await scales(false)).toEqual([0, 0, 0, 0]);
});

test("FP8 experts can be planned and say that they are not served", async () => {
  const isExpert = (name: string) => name.includes(".experts.");
  const scales: Shapes = [["model.layers.1.feed_forward.experts.0.gate_proj.weight_scale", [FFN, 1]]];
  const config = { ...TEXT, quantization_config: { quant_method: "compressed-tensors" } };
  const spec = await read(
    write(config, [...shapesOf("", false), ...scales], (name) =>
      isExpert(name) && !name.endsWith("scale") ? "F8_E4M3" : "BF16",
    ),
  );
  expect(spec.planOnly).toContain("FP8");
  expect(spec.tensors.find((t) => t.role === TensorRole.EXPERT_UP)?.type).toBe(StoredType.F8_E4M3);
});

const SWAPPED: Shapes = shapesOf("", true).map(([name, shape]) =>
  name.endsWith("experts.down_proj") ? [name, [EXPERTS, HIDDEN, FFN]] : [name, shape],
);
test("fused experts of another orientation, of too few experts, or missing are refused by name", async () => {
  expect(await refusal(write(TEXT, SWAPPED))).toContain(
    "experts.down_proj: has shape [3, 8, 6], the configuration implies [3, 6, 8]",
  );
  expect(await refusal(write({ ...TEXT, num_local_experts: 2 }, shapesOf("", true)))).toContain(
    "router.weight: has shape [3, 8]",
  );
  const without = shapesOf("", true).filter(([name]) => name !== "model.layers.3.feed_forward.experts.down_proj");
  expect(await refusal(write(TEXT, without))).toContain(
    "layers.3.feed_forward.experts.down_proj: is missing; expected shape [3, 6, 8]",
  );
});
