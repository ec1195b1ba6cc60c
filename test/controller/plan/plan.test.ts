import fc from "fast-check";
import { expect, describe as suite, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { shardsOf } from "../../../controller/model/shards.ts";
import { kvBytesOfModel } from "../../../controller/plan/candidate.ts";
import {
  cpuInventory,
  deviceOf,
  gpuInventory,
  type Inventory,
  parseInventory,
} from "../../../controller/plan/hardware.ts";
import { condense, keptBytes, kvBytesPerToken, weightLines } from "../../../controller/plan/ledger.ts";
import { type Planned, planShards } from "../../../controller/plan/plan.ts";
import { type Wishes, wishesOf } from "../../../controller/plan/wishes.ts";
import { LedgerClass, type ModelSpec, Reason_Kind, TensorRole } from "../../../proto/gen/muster/v1/plan.ts";
import { fixtureUrl } from "./fixtures.ts";
import { type ModelShape, modelSpec, NINE_HEADS } from "./models.ts";

const MB = 1024 * 1024;

// ---- arbitrary questions ----

const shapes: fc.Arbitrary<ModelShape> = fc
  .record({
    layers: fc.integer({ min: 1, max: 3 }),
    headDim: fc.constantFrom(16, 32),
    kvHeads: fc.integer({ min: 1, max: 4 }),
    perKv: fc.integer({ min: 1, max: 4 }),
    hidden: fc.constantFrom(64, 96, 256),
    vocab: fc.integer({ min: 32, max: 3000 }),
    ffn: fc.integer({ min: 16, max: 700 }),
    experts: fc.constantFrom(0, 0, 4, 6, 8, 16),
    topK: fc.integer({ min: 1, max: 4 }),
    expertFfn: fc.integer({ min: 8, max: 300 }),
    sharedFfn: fc.constantFrom(0, 64, 200),
    contextTokens: fc.constantFrom(512, 4096, 131_072),
    valueBytes: fc.constantFrom(1, 2),
    tied: fc.boolean(),
  })
  .map(({ perKv, ...shape }) => ({ ...shape, heads: shape.kvHeads * perKv }));

/** Undefined four times of five: most questions leave most things open. */
const rarely = <T>(arbitrary: fc.Arbitrary<T>): fc.Arbitrary<T | undefined> =>
  fc.oneof({ weight: 4, arbitrary: fc.constant(undefined) }, { weight: 1, arbitrary });
const size = (max: number) => rarely(fc.integer({ min: 1, max }));

const wishes: fc.Arbitrary<Wishes> = fc
  .record({
    contextTokens: rarely(fc.oneof(fc.integer({ min: 1, max: 4096 }), fc.integer({ min: 1, max: 200_000 }))),
    concurrency: fc.integer({ min: 1, max: 64 }),
    kvBytes: rarely(fc.integer({ min: 1000, max: 2_000 * MB })),
    pins: fc.record({ ranks: size(6), ep: size(6), etp: size(4), workers: size(3), tp: size(6) }),
  })
  .map((changes) => wishesOf(changes));

/** GPUs of so little memory that many questions are refused. */
function smallGpus(count: number, memoryBytes: number, perNode = 4): Inventory {
  const h200 = deviceOf("H200");
  if (h200 === undefined) throw new Error("no H200");
  return gpuInventory({ ...h200, memoryBytes }, count, perNode);
}

const inventories: fc.Arbitrary<Inventory> = fc.oneof(
  fc
    .record({ count: fc.integer({ min: 1, max: 8 }), memory: fc.integer({ min: 1100, max: 1900 }) })
    .map(({ count, memory }) => smallGpus(count, memory * 1e6)),
  fc
    .record({ count: fc.integer({ min: 1, max: 3 }), memory: fc.integer({ min: 215, max: 900 }) })
    .map(({ count, memory }) => cpuInventory(count, { memoryBytes: memory * 1e6 })),
);

type Question = { spec: ModelSpec; inventory: Inventory; wishes: Wishes };

const questions: fc.Arbitrary<Question> = fc
  .record({ shape: shapes, inventory: inventories, wishes })
  .map(({ shape, ...rest }) => ({ spec: modelSpec(shape), ...rest }));

const ask = ({ spec, inventory, wishes: wished }: Question): Planned => planShards(spec, inventory, wished);
const RUNS = { numRuns: 400 };

function withMemory(inventory: Inventory, factor: number): Inventory {
  return {
    nodes: inventory.nodes.map((node) =>
      node.kind === "gpu"
        ? { ...node, devices: node.devices.map((device) => ({ ...device, memoryBytes: device.memoryBytes * factor })) }
        : { ...node, host: { ...node.host, memoryBytes: node.host.memoryBytes * factor } },
    ),
  };
}

suite("properties of every plan", () => {
  test("the questions are of both kinds, or the properties show nothing", () => {
    const kinds = fc.sample(questions, { numRuns: 300, seed: 1 }).map((question) => ask(question));
    const feasible = kinds.filter((planned) => planned.kind === "feasible").length;
    expect(feasible).toBeGreaterThan(40);
    expect(feasible).toBeLessThan(260);
    const remedied = kinds.filter((planned) => planned.kind === "infeasible" && planned.remedy !== undefined).length;
    expect(remedied).toBeGreaterThan(40);
    const codes = new Set(
      kinds.flatMap((planned) => (planned.kind === "infeasible" ? planned.reasons.map(({ code }) => code) : [])),
    );
    expect([...codes]).toEqual(expect.arrayContaining(["memory-short", "context-over-model", "heads-not-divisible"]));
  });

  test("B1, B2: lines add up to used, and a cut fits iff every rank's used is within its capacity", () => {
    fc.assert(
      fc.property(questions, (question) => {
        for (const candidate of ask(question).table.candidates) {
          for (const ledger of candidate.ledgers) {
            const sum = ledger.lines.reduce((total, line) => total + line.bytes, 0n);
            expect(sum).toBe(ledger.used);
          }
          const isWithin = candidate.ledgers.every((ledger) => ledger.used <= ledger.capacity);
          if (candidate.misfit?.code === "kv-bytes-short") expect(candidate.fits).toBe(false);
          else expect(candidate.fits).toBe(isWithin);
        }
      }),
      RUNS,
    );
  });

  test("P1: feasible iff a cut fits; the plan is whole and its context has its blocks", () => {
    fc.assert(
      fc.property(questions, (question) => {
        const planned = ask(question);
        expect(planned.kind === "feasible").toBe(planned.table.candidates.some((candidate) => candidate.fits));
        if (planned.kind === "infeasible") {
          expect(planned.reasons.length).toBeGreaterThan(0);
          for (const reason of planned.reasons) expect(reason.kind).toBe(Reason_Kind.REFUSED);
          return;
        }
        const { plan } = planned;
        expect(plan.ranks).toHaveLength(plan.cut?.world ?? -1);
        expect(plan.ledgers).toHaveLength(plan.ranks.length);
        expect(new Set(plan.ranks.map((rank) => rank.worker)).size).toBe(plan.workers);
        expect((plan.kvBlocks - 1) * plan.kvBlockTokens).toBeGreaterThanOrEqual(
          plan.contextTokens - plan.kvBlockTokens + 1,
        );
        expect(plan.kvBlocks).toBeGreaterThanOrEqual(2);
        if (question.wishes.contextTokens !== undefined) expect(plan.contextTokens).toBe(question.wishes.contextTokens);
        expect(plan.reasons[0]?.kind).toBe(Reason_Kind.CHOSEN);
      }),
      RUNS,
    );
  });

  test("every expert lives on exactly one ep slot, whole over its etp ranks", () => {
    fc.assert(
      fc.property(questions, (question) => {
        const planned = ask(question);
        if (planned.kind === "infeasible") return;
        const { ranks, cut, model } = planned.plan;
        const mlp = model?.blocks[0]?.mlp;
        if (mlp?.$case !== "moe") return;
        for (let expert = 0; expert < mlp.value.experts; expert++) {
          const holders = ranks.filter((rank) => rank.experts.includes(expert));
          expect(holders).toHaveLength(cut?.etp ?? -1);
          expect(new Set(holders.map((rank) => Math.floor(rank.rank / (cut?.etp ?? 1)))).size).toBe(1);
          const width = holders.reduce(
            (sum, { expertFfn }) => sum + (expertFfn?.end ?? 0) - (expertFfn?.begin ?? 0),
            0,
          );
          expect(width).toBe(mlp.value.expertFfn);
        }
      }),
      RUNS,
    );
  });

  test("P2: more memory, and more nodes, never turn a plan into a refusal", () => {
    fc.assert(
      fc.property(questions, fc.double({ min: 1, max: 4, noNaN: true }), (question, factor) => {
        if (ask(question).kind === "infeasible") return;
        expect(ask({ ...question, inventory: withMemory(question.inventory, factor) }).kind).toBe("feasible");
        const small = withMemory(question.inventory, 1 / factor).nodes;
        const more = { nodes: [...small, ...question.inventory.nodes] };
        expect(ask({ ...question, inventory: more }).kind).toBe("feasible");
      }),
      RUNS,
    );
  });

  test("P3: a remedy, applied, is a plan; and so are smaller wishes than those of a plan", () => {
    fc.assert(
      fc.property(questions, (question) => {
        const planned = ask(question);
        if (planned.kind === "infeasible") {
          if (planned.remedy === undefined) return;
          const { inventory, wishes: wished } = planned.remedy;
          expect(ask({ ...question, inventory, wishes: wished }).kind, planned.remedy.text).toBe("feasible");
          return;
        }
        const { contextTokens, concurrency } = question.wishes;
        const smaller = {
          ...question.wishes,
          contextTokens: contextTokens === undefined ? undefined : Math.ceil(contextTokens / 2),
          concurrency: Math.ceil(concurrency / 2),
        };
        expect(ask({ ...question, wishes: smaller }).kind).toBe("feasible");
      }),
      RUNS,
    );
  });

  test("same question, same answer; another cut, context or KV size has another revision", () => {
    fc.assert(
      fc.property(questions, (question) => {
        expect(ask(question)).toEqual(ask(question));
      }),
      { numRuns: 60 },
    );
    const spec = modelSpec(NINE_HEADS);
    const revision = (changes: Partial<Wishes>): string => {
      const planned = planShards(spec, cpuInventory(4), wishesOf(changes));
      return planned.kind === "feasible" ? planned.plan.revision : "refused";
    };
    const revisions = [
      { pins: { ranks: 1 } },
      { pins: { ranks: 3 } },
      { contextTokens: 512 },
      { kvBytes: 64 * MB },
    ].map(revision);
    expect(new Set(revisions).size).toBe(4);
    expect(revisions).not.toContain("refused");
  });
});

suite("the ledger", () => {
  test("nano-maverick on one CPU rank holds exactly its stored bytes", async () => {
    const spec = await readModel("builtin://nano-maverick", { headersOnly: true });
    const [shard] = shardsOf(spec, { world: 1, tp: 1, dp: 1, ep: 1, etp: 1, pp: 1 }, 1);
    if (shard === undefined) throw new Error("no shard");
    const lines = weightLines(condense(spec), shard);
    const stored = spec.tensors.reduce((sum, tensor) => sum + Number(tensor.bytes), 0);
    expect([...lines.values()].reduce((sum, bytes) => sum + bytes, 0)).toBe(stored);
    // 8 experts x 3 planes x 256 x 256 x 2 bytes x 2 layers; 2 x 2048 x 256 x 2 bytes.
    expect(lines.get(LedgerClass.EXPERTS)).toBe(6_291_456);
    expect(lines.get(LedgerClass.EMBEDDING)).toBe(1_048_576);
    // 4 layers x (key + value) x 2 heads x 32 x 4 bytes.
    expect(kvBytesPerToken(spec, shard, "cpu")).toBe(2048);
  });

  test("ranks together hold each split plane once, and replicated ones everywhere, also in quantised formats", async () => {
    for (const source of ["builtin://nano-maverick", "builtin://nano-maverick-q4_k_m"]) {
      const spec = await readModel(source, { headersOnly: true });
      const model = condense(spec);
      const whole = weightLines(
        model,
        shardsOf(spec, { world: 1, tp: 1, dp: 1, ep: 1, etp: 1, pp: 1 }, 1)[0] ?? fail(),
      );
      const parts = shardsOf(spec, { world: 2, tp: 2, dp: 1, ep: 2, etp: 1, pp: 1 }, 2).map((shard) =>
        weightLines(model, shard),
      );
      for (const [type, bytes] of whole) {
        const sum = parts.reduce((total, lines) => total + (lines.get(type) ?? 0), 0);
        expect(sum, `class ${type} of ${source}`).toBe(type === LedgerClass.NORMS ? 2 * bytes : bytes);
      }
    }
  });

  test("a cut inside a group of 32 columns keeps the whole group on both sides", () => {
    const down = modelSpec({ ...NINE_HEADS, ffn: 96 }).tensors.find((tensor) => tensor.role === TensorRole.DOWN);
    if (down === undefined) throw new Error("no down projection");
    expect([down.rows, down.cols]).toEqual([576, 96]);
    expect(keptBytes(down, 576, { begin: 0, end: 32 })).toBe(576 * 32 * 2);
    expect(keptBytes(down, 576, { begin: 0, end: 48 })).toBe(576 * 64 * 2);
    expect(keptBytes(down, 576, { begin: 48, end: 96 })).toBe(576 * 64 * 2);
    expect(keptBytes(down, 0, { begin: 0, end: 96 })).toBe(0);
  });

  test("KV bytes of a token are those of the published data sheets", async () => {
    const sheets = [
      ["llama-4-maverick", 196_608],
      ["llama-4-behemoth-projection", 393_216],
      ["deepseek-v3", 70_272],
      ["qwen3-235b-a22b", 192_512],
    ] as const;
    for (const [name, bytes] of sheets) {
      const spec = await readModel(fixtureUrl(name), { headersOnly: true });
      expect(kvBytesOfModel(spec, "gpu"), name).toBe(bytes);
    }
  });

  test("latent KV does not shrink with tp, grouped KV does until there is one head a rank", async () => {
    const kvOf = async (name: string, world: number): Promise<number> => {
      const spec = await readModel(fixtureUrl(name), { headersOnly: true });
      const [shard] = shardsOf(spec, { world, tp: world, dp: 1, ep: 1, etp: world, pp: 1 }, 1);
      return shard === undefined ? 0 : kvBytesPerToken(spec, shard, "gpu");
    };
    expect(await kvOf("deepseek-v3", 8)).toBe(70_272);
    expect(await kvOf("qwen3-235b-a22b", 2)).toBe(96_256);
    expect(await kvOf("qwen3-235b-a22b", 4)).toBe(48_128);
    expect(await kvOf("qwen3-235b-a22b", 8)).toBe(48_128);
  });
});

function fail(): never {
  throw new Error("nothing there");
}

suite("refusals and remedies", () => {
  const machine = cpuInventory(1);

  test("nine heads on two ranks: refused with its reason, and three ranks fit", () => {
    const planned = planShards(modelSpec(NINE_HEADS), machine, wishesOf({ pins: { ranks: 2 } }));
    if (planned.kind === "feasible") throw new Error("it must not fit");
    expect(planned.reasons[0]).toMatchObject({
      code: "heads-not-divisible",
      text: "9 query heads do not divide over tp 2.",
    });
    expect(planned.remedy).toMatchObject({ kind: "ranks", text: "ranks 3 fits" });
  });

  test("a context too long for memory is shortened, in whole thousands", () => {
    const shape = { ...NINE_HEADS, contextTokens: 1_048_576 };
    const planned = planShards(
      modelSpec(shape),
      smallGpus(1, 3.5e9),
      wishesOf({ contextTokens: 131_072, concurrency: 1 }),
    );
    if (planned.kind === "feasible") throw new Error("it must not fit");
    expect(planned.reasons[0]?.code).toBe("memory-short");
    expect(planned.remedy?.kind).toBe("context");
    expect(planned.remedy?.text).toMatch(/^context \d+k fits$/);
  });

  test("weights too large for the devices: more of them", async () => {
    const spec = await readModel(fixtureUrl("llama-4-maverick"), { headersOnly: true });
    const inventory = parseInventory("4xH200");
    if (typeof inventory === "string") throw new Error(inventory);
    const planned = planShards(spec, inventory, wishesOf({ contextTokens: 32_768 }));
    if (planned.kind === "feasible") throw new Error("it must not fit");
    expect(planned.remedy).toMatchObject({ kind: "devices", text: "8xH200 fit" });
  });

  test("pins that contradict each other or the version are refused by name", () => {
    const spec = modelSpec({ ...NINE_HEADS, heads: 8, kvHeads: 4, experts: 8, topK: 1, expertFfn: 64 });
    const codes = (pins: Wishes["pins"]): string[] => {
      const planned = planShards(spec, cpuInventory(2), wishesOf({ pins }));
      return planned.kind === "feasible" ? [] : planned.reasons.map((reason) => reason.code);
    };
    expect(codes({ ranks: 4, tp: 2 })).toContain("tp-dp-not-world");
    expect(codes({ ranks: 4, ep: 3 })).toContain("ep-etp-not-world");
    expect(codes({ dp: 2, tp: 2 })).toContain("dp-not-supported");
    expect(codes({ pp: 2 })).toContain("pp-not-supported");
    expect(codes({ ep: 0 })).toContain("wish-not-positive");
    expect(codes({ ranks: 3, workers: 2 })).toContain("ranks-uneven");
    expect(codes({ workers: 3 })).toContain("nodes-short");
    expect(codes({ ranks: 4, ep: 2, etp: 2, workers: 2 })).toEqual([]);
  });

  test("pinned KV bytes are kept exactly, or refused where they hold no full context", () => {
    const spec = modelSpec(NINE_HEADS);
    const planned = planShards(spec, machine, wishesOf({ kvBytes: 64 * MB, pins: { ranks: 1 } }));
    if (planned.kind === "infeasible") throw new Error("it must fit");
    const kv = planned.plan.ledgers[0]?.lines.find((line) => line.class === LedgerClass.KV)?.bytes ?? 0n;
    const block = 30 * 2 * 3 * 64 * 4 * 16;
    expect(planned.plan.kvBlocks).toBe(Math.floor((64 * MB) / block));
    expect(Number(kv)).toBe(planned.plan.kvBlocks * block);
    expect(planned.plan.contextTokens).toBe((planned.plan.kvBlocks - 1) * 16);
    const refused = planShards(spec, machine, wishesOf({ kvBytes: 64 * MB, contextTokens: 4096 }));
    expect(refused.kind === "infeasible" && refused.reasons[0]?.code).toBe("kv-bytes-short");
  });

  test("a hardware text that says nothing is refused with what is known", () => {
    expect(parseInventory("8xH2000")).toContain("known: A100-80");
    expect(parseInventory("0xH200")).toContain("is not COUNTxPRODUCT");
    expect(parseInventory("H200")).toContain("is not COUNTxPRODUCT");
    expect(parseInventory("9999xH200")).toContain("at most 1024");
    expect(parseInventory("8xH200", 3)).toContain("do not spread evenly");
  });
});
