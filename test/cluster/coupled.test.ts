// Speculation on equals off, token for token, whatever happens on the bus: 180 seeded runs with a real draft behind a relay that
// loses, repeats, delays and garbles frames, with drafts that die and come back, and with strangers that answer garbage.
import { beforeAll, describe, expect, test } from "vitest";
import type { ModelSpec } from "../../proto/gen/muster/v1/plan.ts";
import { Frame, Hello, type Hint, Nack_Reason } from "../../proto/gen/muster/v1/speculation.ts";
import type { Open } from "../../proto/gen/muster/v1/worker.ts";
import { type Bus, MemoryBus } from "../../worker/spec/bus.ts";
import { until } from "../until.ts";
import { type Faults, noFaults, randomFrom, relay } from "../worker/spec/relay.ts";
import {
  type Answer,
  Drafter,
  helloOn,
  PROMPTS,
  readNano,
  Serving,
  sampled,
  speculatorOf,
  textOf,
} from "./in-process.ts";

const LAYOUT = { ranks: 2, ep: 2, workers: 1 };
const TOKENS = 48;
const RUNS_OF_SCENARIO = 20;
const WAVE = 7;
const WAIT_MS = 40;

const filters = [
  {},
  { topP: 0.9 },
  { repetitionPenalty: 1.2, presencePenalty: 0.3 },
  { frequencyPenalty: 0.4, topK: 50, minP: 0.01, logitBias: [{ id: 290, bias: 2 }] },
];

function requestOf(seed: number): Partial<Open> {
  const temperature = [0, 0.7, 1][seed % 3] ?? 0;
  return {
    input: textOf(PROMPTS[seed % PROMPTS.length] ?? ""),
    maxTokens: TOKENS,
    ignoreEos: true,
    seedLow: BigInt(seed),
    seedHigh: BigInt(seed % 5),
    sampling: sampled(temperature, filters[Math.floor(seed / 3) % filters.length]),
  };
}

/** A stranger on the drafts' side of the bus: answers every frame with hints under the right hashes and random tokens. */
function adversary(bus: Bus, seed: number) {
  const random = randomFrom(seed);
  const below = (limit: number) => Math.floor(random() * limit);
  const counts = { hints: 0, nacks: 0 };
  const end = bus.subscribe("spec.v1.d.*.c", (data) => {
    let frame: Frame;
    try {
      frame = Frame.decode(data);
    } catch {
      return; // garbled on its way
    }
    const heard = [...frame.opens, ...frame.commits];
    const hints: Hint[] = heard.map(({ session, generation, hashLow, hashHigh }) => ({
      session,
      generation,
      hashLow,
      hashHigh,
      // Some ids do not exist.
      tokens: Array.from({ length: below(9) }, () => below(random() < 0.1 ? 2 ** 32 : 2048)),
    }));
    const nacks = heard
      .filter(() => random() < 0.05)
      .map(({ session, generation }) => ({ session, generation, reason: Nack_Reason.GAP }));
    counts.hints += hints.length;
    counts.nacks += nacks.length;
    const subject = `spec.v1.t.${frame.source.toString(16).padStart(16, "0")}.p`;
    bus.publish(subject, Frame.encode(Frame.create({ source: 666n, hints, nacks })).finish());
    bus.publish(
      subject,
      Uint8Array.from({ length: below(64) }, () => below(256)),
    );
  });
  return { counts, end };
}

/** As a draft says it, from a subject where the adversary listens. */
function sayHello(bus: Bus, model: ModelSpec): void {
  const vocabHash = model.tokenizer?.vocabHash ?? 0n;
  const hello = Hello.create({ source: 666n, model: "garbage", vocabHash, subject: "spec.v1.d.garbage.c" });
  bus.publish("spec.v1.pool.test.hello", Hello.encode(hello).finish());
}

describe("speculation on equals off, token for token", () => {
  let target: ModelSpec;
  let draft: ModelSpec;
  const plain = new Map<number, number[]>();
  const compared = new Set<number>();

  const seedsOf = (scenario: number) =>
    Array.from({ length: RUNS_OF_SCENARIO }, (_, run) => scenario * RUNS_OF_SCENARIO + run);

  beforeAll(async () => {
    [target, draft] = await Promise.all([readNano("nano-maverick"), readNano("nano-draft")]);
    const serving = await Serving.open(target, { layout: LAYOUT });
    const seeds = Array.from({ length: 10 }, (_, scenario) => seedsOf(scenario)).flat();
    const answers = await Promise.all(seeds.map((seed) => serving.run(requestOf(seed))));
    for (const [at, { tokens, finish }] of answers.entries()) {
      expect(tokens).toHaveLength(TOKENS);
      expect(finish.drafted).toBe(0);
      plain.set(seeds[at] ?? -1, tokens);
    }
    expect(new Set([...plain.values()].map((tokens) => tokens.join())).size).toBeGreaterThan(seeds.length * 0.7);
    await serving.stop();
  });

  type Bed = { serving: Serving; toTarget: Bus; toDrafts: Bus; counts: ReturnType<typeof relay>["counts"] };
  type Wish = { faults: Partial<Faults>; seed: number; waitMs?: number };

  /**
   * A leader on one side of a relay; `start` puts drafts on the other, undisturbed until the leader has heard of one, and
   * returns how to end them; then `use` runs among the faults.
   */
  async function withBed(
    wish: Wish,
    start: (bus: Bus) => Promise<() => Promise<void>>,
    use: (bed: Bed) => Promise<void>,
  ) {
    const toTarget = new MemoryBus();
    const toDrafts = new MemoryBus();
    const options = { faults: noFaults, seed: wish.seed };
    const link = relay(toTarget, toDrafts, options);
    const speculator = speculatorOf(target, { bus: toTarget, waitMs: wish.waitMs ?? WAIT_MS });
    const serving = await Serving.open(target, { layout: LAYOUT, speculator });
    try {
      const hello = helloOn(toTarget);
      const end = await start(toDrafts);
      await hello;
      options.faults = { ...noFaults, ...wish.faults };
      await use({ serving, toTarget, toDrafts, counts: link.counts });
      await end();
    } finally {
      await serving.stop();
      await speculator.stop();
      link.stop();
      await Promise.all([toTarget.close(), toDrafts.close()]);
    }
  }

  /** Serves the seeds at once; every stream must be the plain one. Returns what was drafted and accepted. */
  async function check({ serving }: Bed, seeds: number[], onTokens?: (count: number) => void) {
    const run = async (seed: number): Promise<Answer> => {
      const answer = await serving.run({ ...requestOf(seed), speculation: true }, onTokens);
      expect(answer.tokens, `seed ${seed}`).toEqual(plain.get(seed));
      compared.add(seed);
      return answer;
    };
    const answers = await Promise.all(seeds.map(run));
    const sum = (count: (answer: Answer) => number) => answers.reduce((total, each) => total + count(each), 0);
    return { drafted: sum(({ finish }) => finish.drafted), accepted: sum(({ finish }) => finish.accepted) };
  }

  // Waits long enough where nothing gets lost; short ones elsewhere, so that steps go on without what is late.
  const scenarios: { name: string; faults: Partial<Faults>; waitMs: number; acceptedMin: number }[] = [
    { name: "nothing goes wrong", faults: {}, waitMs: 5_000, acceptedMin: 450 },
    { name: "30 % of the frames are lost", faults: { loss: 0.3 }, waitMs: 40, acceptedMin: 20 },
    { name: "half of the frames come twice", faults: { duplicate: 0.5 }, waitMs: 5_000, acceptedMin: 450 },
    { name: "frames are late by up to 50 ms", faults: { delayMsMax: 50 }, waitMs: 40, acceptedMin: 20 },
    { name: "a third of the frames is garbled", faults: { garble: 0.33 }, waitMs: 40, acceptedMin: 20 },
    {
      name: "all of it",
      faults: { loss: 0.3, duplicate: 0.3, delayMsMax: 50, garble: 0.1 },
      waitMs: 120,
      acceptedMin: 5,
    },
  ];

  const startDrafter = async (bus: Bus) => {
    const drafter = await Drafter.start(draft, bus);
    return () => drafter.kill();
  };

  test.each(scenarios.map((each, index) => ({ ...each, index })))("$name", async (scenario) => {
    const { faults, waitMs, acceptedMin, index } = scenario;
    await withBed({ faults, waitMs, seed: index }, startDrafter, async (bed) => {
      // In waves: fewer requests share the fate of a frame.
      const seeds = seedsOf(index);
      let accepted = 0;
      while (seeds.length > 0) accepted += (await check(bed, seeds.splice(0, WAVE))).accepted;
      expect(accepted).toBeGreaterThanOrEqual(acceptedMin);
      expect(bed.counts.lost > 0).toBe(faults.loss !== undefined);
      expect(bed.counts.repeated > 0).toBe(faults.duplicate !== undefined);
      expect(bed.counts.garbled > 0).toBe(faults.garble !== undefined);
    });
  });

  test("a draft that sends garbage", async () => {
    const startGarbage = async (bus: Bus) => {
      const { counts, end } = adversary(bus, 6);
      sayHello(bus, target);
      return async () => {
        end();
        expect(counts.hints).toBeGreaterThan(100);
        expect(counts.nacks).toBeGreaterThan(0);
      };
    };
    await withBed({ faults: {}, seed: 6 }, startGarbage, async (bed) => {
      const { drafted, accepted } = await check(bed, seedsOf(6));
      expect(drafted).toBeGreaterThan(100);
      expect(accepted).toBeLessThan(drafted / 10);
    });
  });

  test("a stranger that sends garbage beside the draft, among faults", async () => {
    const startBoth = async (bus: Bus) => {
      const { counts, end } = adversary(bus, 7);
      const drafter = await Drafter.start(draft, bus);
      return async () => {
        end();
        expect(counts.hints).toBeGreaterThan(100);
        await drafter.kill();
      };
    };
    await withBed({ faults: { loss: 0.1, duplicate: 0.2, delayMsMax: 10 }, seed: 7 }, startBoth, async (bed) => {
      const { accepted } = await check(bed, seedsOf(7));
      expect(accepted).toBeGreaterThan(0);
      expect(bed.counts.lost).toBeGreaterThan(0);
    });
  });

  // The leader takes a silent draft for dead after 1.5 s; it waits for hints long enough to hear of the next one meanwhile.
  test("the draft is killed in the middle and another one comes, twice", async () => {
    let drafter: Drafter;
    const startOne = async (bus: Bus) => {
      drafter = await Drafter.start(draft, bus);
      return () => drafter.kill();
    };
    await withBed({ faults: { loss: 0.05 }, seed: 8, waitMs: 250 }, startOne, async (bed) => {
      const seeds = seedsOf(8);
      const spare = seedsOf(9);
      for (const half of [seeds.slice(0, RUNS_OF_SCENARIO / 2), seeds.slice(RUNS_OF_SCENARIO / 2)]) {
        let restarted: Promise<{ before: number }> | undefined;
        const restart = async () => {
          const before = drafter.worker.rounds;
          await drafter.kill();
          drafter = await Drafter.start(draft, bed.toDrafts);
          return { before };
        };
        await check(bed, half, (count) => {
          if (count >= TOKENS / 4) restarted ??= restart();
        });
        expect((await restarted)?.before).toBeGreaterThan(0);
        await until(async () => {
          await check(bed, half.slice(0, 1));
          return drafter.worker.rounds > 0;
        }, "the next draft has work");
        // Seeds without hints of earlier runs: what is accepted now comes from the new draft.
        expect((await check(bed, spare.splice(0, 3))).accepted).toBeGreaterThan(0);
      }
    });
  });

  test("that were 180 runs of different seeds", () => {
    expect(compared.size).toBeGreaterThanOrEqual(9 * RUNS_OF_SCENARIO);
  });
});
