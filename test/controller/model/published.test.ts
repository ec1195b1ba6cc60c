// Configurations of published models (and one projection): parameter totals, and that a plan needs nothing but config.json.
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { type ModelSpec, ShardRule, StoredType, TensorRole } from "../../../proto/gen/muster/v1/plan.ts";

const read = (name: string): Promise<ModelSpec> =>
  readModel(`file://./test/fixtures/configs/${name}`, { headersOnly: true });
const billions = (count: bigint): string => (Number(count) / 1e9).toFixed(3);

// Text model; "active" counts embedding and head in full.
const TOTALS = [
  ["llama-4-scout", "107.770", "17.173"],
  ["llama-4-maverick", "400.712", "17.185"],
  ["llama-4-behemoth-projection", "1991.729", "288.506"],
  ["deepseek-v3", "671.026", "37.552"],
  ["qwen3-235b-a22b", "235.094", "22.191"],
] as const;

for (const [name, total, active] of TOTALS) {
  test(`${name}: ${total} B parameters, ${active} B active`, async () => {
    const spec = await read(name);
    expect(billions(spec.parameters)).toBe(total);
    expect(billions(spec.parametersActive)).toBe(active);
    expect(spec.planOnly).not.toBe("");
    expect(spec.projected).toBe(name.includes("projection"));
  });
}

test("families that are not served say so by name", async () => {
  expect((await read("deepseek-v3")).planOnly).toContain("family deepseek_v3");
  expect((await read("qwen3-235b-a22b")).planOnly).toContain("family qwen3_moe");
  expect((await read("llama-4-scout")).planOnly).toContain("has no weights");
});

test("a synthesised table takes exactly the bytes of its planes", async () => {
  for (const [name] of TOTALS) {
    const spec = await read(name);
    expect(spec.tensors.reduce((sum, plane) => sum + plane.bytes, 0n)).toBe(spec.files[0]?.bytes);
  }
});

test("DeepSeek-V3 stores projections as FP8 with a scale for each block of 128 x 128: 673 GB in all", async () => {
  const spec = await read("deepseek-v3");
  expect((Number(spec.files[0]?.bytes) / 1e9).toFixed(0)).toBe("673");
  const down = spec.tensors.find((t) => t.name === "model.layers.3.mlp.experts.255.down_proj.weight");
  expect(down).toMatchObject({ type: StoredType.F8_E4M3, rule: ShardRule.EXPERT, rows: 7168, cols: 2048 });
  const scale = spec.tensors.find((t) => t.name === "model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv");
  expect(scale).toMatchObject({ role: TensorRole.OTHER, type: StoredType.F32, rows: 5, cols: 56 });
  const latent = spec.tensors.find((t) => t.name === "model.layers.0.self_attn.kv_a_proj_with_mqa.weight");
  expect(latent).toMatchObject({ rule: ShardRule.LATENT, rows: 576 });
  expect(spec.blocks[0]?.attention?.scale).toBeCloseTo(0.1352337, 6);
  // The latent cache of a token: (512 + 64) values a layer, key and value planes together.
  expect(spec.kvGroups[0]).toMatchObject({ kvHeads: 1, headDim: 288 });
});

test("Maverick is 401 G values of BF16, every second layer of experts", async () => {
  const spec = await read("llama-4-maverick");
  expect(Number(spec.files[0]?.bytes)).toBe(Number(spec.parameters) * 2);
  expect(spec.blocks.map((block) => block.mlp?.$case).slice(0, 4)).toEqual(["dense", "moe", "dense", "moe"]);
  expect(spec.stopIds).toEqual([200001, 200007, 200008]);
});
