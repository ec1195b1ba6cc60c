import { beforeAll, describe, expect, test } from "vitest";
import { crdOf } from "../../../controller/api/crd.ts";
import { parseShardPlan } from "../../../controller/api/parse.ts";
import {
  fromResource,
  restorePlan,
  SHARD_PLAN_BYTES_MAX,
  type ShardPlanSpec,
  toResource,
} from "../../../controller/api/shard-plan.ts";
import { readModel } from "../../../controller/model/model.ts";
import { shardsOf } from "../../../controller/model/shards.ts";
import { parseInventory } from "../../../controller/plan/hardware.ts";
import { planShards } from "../../../controller/plan/plan.ts";
import { wishesOf } from "../../../controller/plan/wishes.ts";
import { FaultError } from "../../../proto/fault.ts";
import { LedgerClass, type ModelSpec, type ShardPlan } from "../../../proto/gen/muster/v1/plan.ts";
import { fixtureUrl } from "../plan/fixtures.ts";
import { planObject } from "./objects.ts";

const PACKAGING = { image: `worker@sha256:${"0".repeat(64)}`, podTemplateDigest: "cd".repeat(32) };

async function planOf(source: string, gpus: string): Promise<ShardPlan & { model: ModelSpec }> {
  const model = await readModel(source, { headersOnly: true });
  const inventory = parseInventory(gpus);
  if (typeof inventory === "string") throw new Error(inventory);
  const planned = planShards(model, inventory, wishesOf());
  if (planned.kind === "infeasible") throw new Error(planned.reasons.map(({ text }) => text).join(" "));
  return { ...planned.plan, model };
}

describe.each([
  ["deepseek-v3", "8xH200"],
  ["llama-4-behemoth-projection", "32xH200"],
  ["llama-4-behemoth-projection", "64xH100"],
  ["llama-4-maverick", "8xH200"],
])("%s on %s as a resource", (name, gpus) => {
  let plan: ShardPlan & { model: ModelSpec };
  let spec: ShardPlanSpec;
  beforeAll(async () => {
    plan = await planOf(fixtureUrl(name), gpus);
    spec = toResource(plan, PACKAGING);
  }, 120_000);

  test("is far below 256 KB, in JSON as the API server stores it", () => {
    const stored = JSON.stringify(planObject({ ...spec }));
    expect(Buffer.byteLength(stored)).toBeLessThan(SHARD_PLAN_BYTES_MAX);
    expect(Buffer.byteLength(stored)).toBeLessThan(16 * 1024);
  });

  test("F1: comes back as the same plan with the model's headers", () => {
    const stored: unknown = JSON.parse(JSON.stringify(planObject({ ...spec })));
    const parsed = parseShardPlan(stored);
    if (parsed.kind === "refused") throw new FaultError(parsed.fault);
    const restored = restorePlan(parsed.value.spec, plan.model, shardsOf);
    expect(restored.kind === "ok" && restored.value.ranks).toEqual(plan.ranks);
    expect(restored.kind === "ok" && { ...restored.value, model: undefined }).toEqual({ ...plan, model: undefined });
    expect(restored.kind === "ok" && restored.value.model).toBe(plan.model);
  });

  test("without the headers it has everything but ranks and tensors", () => {
    const outline = fromResource(spec);
    expect({ ...outline, ranks: plan.ranks, model: undefined }).toEqual({ ...plan, model: undefined });
    expect(outline.model).toMatchObject({
      name: plan.model.name,
      digest: plan.model.digest,
      parameters: plan.model.parameters,
      vocabSize: plan.model.vocabSize,
      tensors: [],
    });
  });

  test("holds no node, file or tensor", () => {
    const text = JSON.stringify(spec);
    const [file] = plan.model.files;
    expect(text).not.toContain("node-0");
    expect(text).not.toContain("offset");
    if (file?.path) expect(text).not.toContain(file.path);
  });

  test("states every rank once, with sums that are right", () => {
    const ranks = spec.ledgers.flatMap((ledger) =>
      ledger.ranks.flatMap(({ first, last }) => Array.from({ length: last - first + 1 }, (_, index) => first + index)),
    );
    expect(ranks.toSorted((a, b) => a - b)).toEqual(plan.ranks.map(({ rank }) => rank));
    for (const { bytes, used } of spec.ledgers)
      expect(Object.values(bytes).reduce<number>((sum, one) => sum + (one ?? 0), 0)).toBe(used);
  });
});

function ledgerClass(index: number): LedgerClass {
  const classes = Object.values(LedgerClass).filter((one) => one !== LedgerClass.UNSPECIFIED);
  return classes[index] ?? LedgerClass.RESERVE;
}

function faultCode(run: () => unknown): string | undefined {
  try {
    run();
    return undefined;
  } catch (error) {
    if (error instanceof FaultError) return error.fault.code;
    throw error;
  }
}

describe("a stored plan is authoritative", () => {
  let plan: ShardPlan & { model: ModelSpec };
  beforeAll(async () => {
    plan = await planOf("builtin://nano-maverick", "4xcpu");
  }, 60_000);

  test("F2: other headers are refused", () => {
    const spec = toResource(plan, PACKAGING);
    const restored = restorePlan(spec, { ...plan.model, digest: "ff".repeat(32) }, shardsOf);
    expect(restored.kind === "refused" && restored.fault).toMatchObject({
      field: "spec.model.digest",
      code: "model_changed",
    });
  });

  test("F2: other shard rules are refused, whatever the digest says", () => {
    const spec = toResource(plan, PACKAGING);
    const [first] = plan.model.tensors;
    if (first === undefined) throw new Error("the model has no tensors");
    const tensors = plan.model.tensors.map((tensor) =>
      tensor.role === first.role ? { ...tensor, rule: 1 as const } : tensor,
    );
    const restored = restorePlan(spec, { ...plan.model, tensors }, shardsOf);
    expect(restored.kind === "refused" && restored.fault).toMatchObject({
      field: "spec.shardRules",
      code: "shard_rules_changed",
    });
  });

  test("keeps the vocabulary by which drafts are paired", () => {
    const outline = fromResource(toResource(plan, PACKAGING));
    expect(outline.model?.tokenizer?.vocabHash).toBe(plan.model.tokenizer?.vocabHash);
  });

  test("F3: a plan above the bound is a fault that names the ledgers", () => {
    // The worst that the bound of ranks allows: a thousand ranks, each of which holds something else of every class.
    const ledgers = Array.from({ length: 1024 }, (_, rank) => {
      const lines = Array.from({ length: 11 }, (_, index) => ({
        class: ledgerClass(index),
        bytes: BigInt(1e12 + rank),
      }));
      return { rank, lines, used: BigInt(11e12 + 11 * rank), capacity: BigInt(20e12) };
    });
    const code = faultCode(() => toResource({ ...plan, ledgers }, PACKAGING));
    expect(code).toBe("plan_too_large");
    expect(faultCode(() => toResource({ ...plan, ledgers: ledgers.slice(0, 512) }, PACKAGING))).toBeUndefined();
  });

  test("an even cut of 1024 ranks is a few lines", () => {
    const [ledger] = plan.ledgers;
    if (ledger === undefined) throw new Error("the plan has no ledger");
    const ledgers = Array.from({ length: 1024 }, (_, rank) => ({ ...ledger, rank }));
    const spec = toResource({ ...plan, ledgers }, PACKAGING);
    expect(spec.ledgers).toHaveLength(1);
    expect(fromResource(spec).ledgers).toEqual(ledgers);
  });

  test("the definition makes the spec immutable", () => {
    expect(JSON.stringify(crdOf("ShardPlan"))).toContain('"rule":"self == oldSelf"');
  });
});
