import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { blocksFor } from "../../../worker/kv/block-pool.ts";
import { type Budget, type Decision, runningLimit, schedule } from "../../../worker/schedule/schedule.ts";

type Fake = {
  id: number;
  length: number;
  computed: number;
  blocksHeld: number;
  remaining: number;
  draftCount: number;
  preempted: number;
};

const state = (running: Fake[], waiting: Fake[], blocksTotal: number, slotsTotal: number) => ({
  running,
  waiting,
  blocksFree: blocksTotal - running.reduce((sum, each) => sum + each.blocksHeld, 0),
  slotsFree: slotsTotal - running.length,
});

/** Everything that must be true of one decision, whatever it decides. */
function check(decision: Decision<Fake>, before: ReturnType<typeof state>, budget: Budget): void {
  const { preempt, admit, rows } = decision;
  // Many small states are looked at: what can be said with one comparison is.
  const tokens = rows.reduce((sum, row) => sum + row.count + row.drafts, 0);
  expect(tokens).toBeLessThanOrEqual(budget.tokensMax); // C1
  expect(rows.length).toBeLessThanOrEqual(budget.rowsMax);
  expect(admit.length).toBeLessThanOrEqual(before.slotsFree + preempt.length);
  const freed = preempt.reduce((sum, each) => sum + each.blocksHeld, 0);
  const taken = rows.reduce((sum, row) => sum + row.grow, 0) + admit.reduce((sum, { blocks }) => sum + blocks, 0);
  expect(taken).toBeLessThanOrEqual(before.blocksFree + freed);
  expect(new Set(rows.map(({ sequence }) => sequence.id)).size).toBe(rows.length);
  const held = new Map(admit.map(({ sequence, blocks }) => [sequence.id, blocks]));
  for (const { sequence, count, drafts, sample, grow } of rows) {
    expect(preempt).not.toContain(sequence);
    expect(count).toBeGreaterThan(0);
    expect(drafts).toBeLessThanOrEqual(Math.min(budget.verifyMax, sequence.draftCount, sequence.remaining - 1));
    expect(sample).toBe(sequence.computed + count === sequence.length);
    if (drafts > 0) expect(sample).toBe(true);
    const blocks = (held.get(sequence.id) ?? sequence.blocksHeld) + grow;
    expect(blocks).toBeGreaterThanOrEqual(blocksFor(sequence.computed + count + drafts, budget.blockTokens));
  }
  // C3: admitted ones are the front of the queue; C4: newest first, and only where somebody must grow.
  expect(admit.map(({ sequence }) => sequence)).toEqual(before.waiting.slice(0, admit.length));
  expect(preempt).toEqual(before.running.slice(before.running.length - preempt.length).reverse());
  if (preempt.length > 0) expect(admit).toEqual([]);
}

/** Runs the queue to its end as the leader would; `accepted` says how many guesses of a row turn out right. */
function simulate(
  requests: { prompt: number; answer: number }[],
  budget: Budget,
  blocksTotal: number,
  draw: () => number,
) {
  const waiting: Fake[] = requests.map(({ prompt, answer }, id) => ({
    id,
    length: prompt,
    computed: 0,
    blocksHeld: 0,
    remaining: answer,
    draftCount: 0,
    preempted: 0,
  }));
  const running: Fake[] = [];
  const finished: number[] = [];
  const trace: string[] = [];
  const most = requests.reduce((sum, { prompt, answer }) => sum + (prompt + answer) * 40, 100);
  for (let steps = 0; running.length + waiting.length > 0; steps++) {
    expect(steps).toBeLessThan(most); // C2: everything ends
    for (const each of running) each.draftCount = Math.floor(draw() * 6);
    const before = state([...running], [...waiting], blocksTotal, 64);
    const decision = schedule(before, budget);
    check(decision, before, budget);
    expect(decision.rows.length).toBeGreaterThan(0);
    const oldest = running[0];
    if (oldest) expect(decision.rows.some(({ sequence }) => sequence === oldest)).toBe(true); // C2
    for (const victim of decision.preempt) {
      running.splice(running.indexOf(victim), 1);
      waiting.unshift(
        Object.assign(victim, { computed: 0, blocksHeld: 0, draftCount: 0, preempted: victim.preempted + 1 }),
      );
    }
    for (const { sequence, blocks } of decision.admit) {
      waiting.shift();
      running.push(Object.assign(sequence, { blocksHeld: blocks }));
    }
    trace.push(JSON.stringify(decision.rows.map(({ sequence, count, drafts }) => [sequence.id, count, drafts])));
    for (const { sequence, count, drafts, sample, grow } of decision.rows) {
      const accepted = Math.floor(draw() * (drafts + 1));
      sequence.blocksHeld += grow;
      sequence.computed += count + accepted;
      if (!sample) continue;
      sequence.length += accepted + 1;
      sequence.remaining -= accepted + 1;
      if (sequence.remaining > 0) continue;
      running.splice(running.indexOf(sequence), 1);
      finished.push(sequence.id);
    }
  }
  return { finished, trace };
}

const random = (seed: number) => () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 4294967296;
};

const scenario = fc.record({
  requests: fc.array(fc.record({ prompt: fc.integer({ min: 1, max: 60 }), answer: fc.integer({ min: 1, max: 40 }) }), {
    minLength: 1,
    maxLength: 20,
  }),
  budget: fc.record({
    tokensMax: fc.integer({ min: 1, max: 40 }),
    rowsMax: fc.integer({ min: 1, max: 10 }),
    verifyMax: fc.nat(5),
    runningMax: fc.integer({ min: 1, max: 12 }),
    blockTokens: fc.constantFrom(1, 4, 16),
  }),
  spare: fc.nat(20),
  seed: fc.nat(),
});
type Scenario = typeof scenario extends fc.Arbitrary<infer T> ? T : never;

const runOf = ({ requests, budget: given, spare, seed }: Scenario) => {
  const longest = Math.max(...requests.map(({ prompt, answer }) => prompt + answer));
  const budget = { ...given, runningMax: runningLimit(given) };
  return simulate(requests, budget, blocksFor(longest, budget.blockTokens) + spare, random(seed));
};

describe("schedule", () => {
  test("C1 to C4: never over budget, oldest first, everything that is admitted ends", () => {
    fc.assert(
      fc.property(scenario, (given) => {
        expect(runOf(given).finished.sort((a, b) => a - b)).toEqual(given.requests.map((_, id) => id));
      }),
      { numRuns: 100 },
    );
  });

  test("the same state gives the same decision", () => {
    fc.assert(
      fc.property(scenario, (given) => {
        expect(runOf(given).trace).toEqual(runOf(given).trace);
      }),
      { numRuns: 25 },
    );
  });

  const budget: Budget = { tokensMax: 16, rowsMax: 8, verifyMax: 4, runningMax: 8, blockTokens: 4 };
  const decoding = (id: number, length: number, draftCount = 0): Fake => ({
    id,
    length,
    computed: length - 1,
    blocksHeld: blocksFor(length, 4),
    remaining: 50,
    draftCount,
    preempted: 0,
  });
  const fresh = (id: number, length: number): Fake => ({
    id,
    length,
    computed: 0,
    blocksHeld: 0,
    remaining: 50,
    draftCount: 0,
    preempted: 0,
  });
  const rowsOf = ({ rows }: Decision<Fake>) => rows.map(({ sequence, count, drafts }) => [sequence.id, count, drafts]);

  test("decode rows, guesses and a piece of a prompt share one step", () => {
    const decision = schedule(state([decoding(1, 10, 4), decoding(2, 7, 4)], [fresh(3, 40)], 100, 10), budget);
    expect(rowsOf(decision)).toEqual([
      [1, 1, 4],
      [2, 1, 3],
      [3, 7, 0],
    ]);
    expect(decision.rows.map(({ sample }) => sample)).toEqual([true, true, false]);
  });

  test("guesses take all of what is left where nobody else wants it", () => {
    expect(rowsOf(schedule(state([decoding(1, 10, 9), decoding(2, 7, 2)], [], 100, 10), budget))).toEqual([
      [1, 1, 4],
      [2, 1, 2],
    ]);
  });

  test("C4: guesses are cut to free blocks instead of preempting", () => {
    const decision = schedule(state([decoding(1, 11, 4), decoding(2, 8)], [], 5, 10), budget);
    expect(rowsOf(decision)).toEqual([
      [1, 1, 1],
      [2, 1, 0],
    ]);
    expect(decision.preempt).toEqual([]);
  });

  test("C4: who must grow takes the blocks of the newest", () => {
    const [old, middle, young] = [{ ...decoding(1, 9), blocksHeld: 2 }, decoding(2, 8), decoding(3, 8)];
    const decision = schedule(state([old, middle, young], [fresh(4, 1)], 6, 10), budget);
    expect(decision.preempt).toEqual([young]);
    expect(rowsOf(decision)).toEqual([
      [1, 1, 0],
      [2, 1, 0],
    ]);
    expect(decision.admit).toEqual([]);
  });

  test("C3: a short prompt does not overtake a long one that waits for blocks", () => {
    expect(schedule(state([decoding(1, 9)], [fresh(2, 40), fresh(3, 1)], 10, 10), budget).admit).toEqual([]);
  });
});
