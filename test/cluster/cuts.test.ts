// One model, many cuts, one stream of tokens: every way to lay ranks over workers, every backend and instruction set gives the
// tokens that one rank gives. Sums are taken in other orders, so the comparison of a request ends at its first choice that
// was too close to call (both gaps are of the one-rank run), and most of all tokens must be compared. Where only the
// workers differ the numerics are the same, and so is every bit.
import { beforeAll, describe, expect, test } from "vitest";
import type { ModelSpec } from "../../proto/gen/muster/v1/plan.ts";
import type { Open } from "../../proto/gen/muster/v1/worker.ts";
import { devices } from "../../worker/engine/native.ts";
import {
  type Answer,
  type GroupOptions,
  type Layout,
  layoutName,
  PROMPTS,
  readNano,
  Serving,
  sampled,
  textOf,
} from "./in-process.ts";

const TOKENS = 64;
const SCORE_GAP_MIN = 1e-3;
const ROUTER_GAP_MIN = 1e-5;
const COMPARED_MIN = 0.8;
const PROMPTS_OF_CUTS = 16;
/** Plain loops are slow: they answer the first requests only. */
const REQUESTS_OF_SLOW = 8;

const layouts: Layout[] = [
  ...[1, 2].map((workers) => ({ ranks: 2, ep: 1, workers })),
  ...[1, 2].map((workers) => ({ ranks: 2, ep: 2, workers })),
  ...[1, 2, 4].map((workers) => ({ ranks: 4, ep: 4, workers })),
  ...[1, 2, 4].map((workers) => ({ ranks: 4, ep: 2, workers })),
];
const files = ["nano-maverick", "nano-maverick/nano-maverick-Q4_K_M.gguf"];

const requests: Partial<Open>[] = PROMPTS.slice(0, PROMPTS_OF_CUTS).flatMap((prompt, index) =>
  [0, 0.8].map((temperature) => ({
    input: textOf(prompt),
    maxTokens: TOKENS,
    ignoreEos: true,
    margins: true,
    seedLow: BigInt(1000 + index),
    seedHigh: 77n,
    sampling: sampled(temperature),
  })),
);

type Run = { numericsId: string; answers: Answer[] };

async function runAll(model: ModelSpec, options: GroupOptions, count = requests.length): Promise<Run> {
  const serving = await Serving.open(model, options);
  try {
    const answers = await Promise.all(requests.slice(0, count).map((request) => serving.run(request)));
    return { numericsId: serving.numericsId, answers };
  } finally {
    await serving.stop();
  }
}

/** Tokens before the first choice that was too close to call. */
function clearCount({ margins, tokens }: Answer): number {
  const close = margins.findIndex(
    ({ scoreGap, routerGap }) => !(scoreGap >= SCORE_GAP_MIN && routerGap >= ROUTER_GAP_MIN),
  );
  return close < 0 ? tokens.length : close;
}

function expectSameTokens(got: Run, want: Run): void {
  let compared = 0;
  got.answers.forEach(({ tokens }, index) => {
    const answer = want.answers[index];
    if (answer === undefined) throw new Error(`nothing to compare request ${index} with`);
    const count = clearCount(answer);
    compared += count;
    expect(tokens).toHaveLength(TOKENS);
    expect(tokens.slice(0, count), `request ${index}`).toEqual(answer.tokens.slice(0, count));
  });
  expect(compared / (got.answers.length * TOKENS), "share of tokens compared").toBeGreaterThan(COMPARED_MIN);
}

const bitsOf = ({ numericsId, answers }: Run) => ({
  numericsId,
  streams: answers.map(({ tokens, margins }) => ({ tokens, margins })),
});

describe.each(files)("%s", (file) => {
  let model: ModelSpec;
  let oneRank: Run;
  const inOneWorker = new Map<string, Run>();

  beforeAll(async () => {
    model = await readNano(file);
    oneRank = await runAll(model, {});
  });

  test("one rank answers every request in full, each in its own way", () => {
    for (const { tokens, margins } of oneRank.answers) {
      expect(tokens).toHaveLength(TOKENS);
      expect(margins).toHaveLength(TOKENS);
    }
    expect(new Set(oneRank.answers.map(({ tokens }) => tokens.join())).size).toBe(requests.length);
  });

  test.each(layouts.map((layout) => ({ layout, name: layoutName(layout) })))(
    "$name: the tokens of one rank",
    async ({ layout }) => {
      const got = await runAll(model, { layout });
      expectSameTokens(got, oneRank);
      expect(got.numericsId).not.toBe(oneRank.numericsId);
      const cut = `${layout.ranks}/${layout.ep}`;
      const placed = inOneWorker.get(cut);
      if (placed === undefined) inOneWorker.set(cut, got);
      else expect(bitsOf(got)).toEqual(bitsOf(placed));
    },
  );

  test("backend ref: the tokens of backend cpu", async () => {
    expectSameTokens(await runAll(model, { backend: "ref" }, REQUESTS_OF_SLOW), oneRank);
  });

  test.for(["avx512", "avx2", "scalar"])("isa %s: the tokens of this CPU's best", async (isa, { skip }) => {
    skip(!devices().isas.includes(isa), `this CPU has no ${isa}`);
    const count = isa === "scalar" ? REQUESTS_OF_SLOW : requests.length;
    expectSameTokens(await runAll(model, { isa }, count), oneRank);
  });
});
