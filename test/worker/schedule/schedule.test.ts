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
  isUnsettled: boolean;
};

const state = (running: Fake[], waiting: Fake[], blocksTotal: number, slotsTotal: number, isAhead = false) => ({
  running,
  waiting,
  blocksFree: blocksTotal - running.reduce((sum, each) => sum + each.blocksHeld, 0),
  slotsFree: slotsTotal - running.length,
  isAhead,
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
  // C5
  if (before.isAhead) expect(preempt).toEqual([]);
  if (before.running.some(({ isUnsettled }) => isUnsettled)) expect(rows).toEqual([]);
  for (const { sequence } of rows) expect(sequence.remaining).toBeGreaterThan(0);
}

type Request = { prompt: number; answer: number; most: number; guessed: boolean };
type Flight = { step: number; rows: { sequence: Fake; drafts: number; sample: boolean; tokens: number }[] };

/**
 * Runs the queue to its end as the leader does, with up to `depth` steps in flight. A sequence ends after `answer` tokens or,
 * as its request says and the scheduler knows, after `most`; `draw` says how many guesses there are and turn out right.
 */
class Simulation {
  readonly #requests: readonly Request[];
  readonly #budget: Budget;
  readonly #depth: number;
  readonly #draw: () => number;
  readonly #waiting: Fake[];
  readonly #running: Fake[] = [];
  readonly #flights: Flight[] = [];
  #blocksFree: number;
  #resting: { step: number; blocks: number }[] = [];
  #step = 0;
  readonly #out = { finished: [] as number[], trace: [] as string[], ahead: 0, wasted: 0 };

  constructor(options: {
    requests: readonly Request[];
    budget: Budget;
    blocksTotal: number;
    depth: number;
    draw: () => number;
  }) {
    this.#requests = options.requests;
    this.#budget = options.budget;
    this.#depth = options.depth;
    this.#draw = options.draw;
    this.#blocksFree = options.blocksTotal;
    this.#waiting = options.requests.map(({ prompt, most }, id) => ({
      id,
      length: prompt,
      computed: 0,
      blocksHeld: 0,
      remaining: most,
      draftCount: 0,
      isUnsettled: false,
    }));
  }

  run() {
    const most = this.#requests.reduce((sum, { prompt, most }) => sum + (prompt + most) * 40, 100);
    while (this.#running.length + this.#waiting.length > 0) {
      expect(this.#step).toBeLessThan(most); // C2: everything ends
      while (this.#flights.length < this.#depth && this.#launch()) {}
      expect(this.#flights.length).toBeGreaterThan(0);
      this.#land();
    }
    return this.#out;
  }

  #launch(): boolean {
    const isAhead = this.#flights.length > 0;
    for (const each of this.#running) {
      const isGuessed = this.#requests[each.id]?.guessed && !each.isUnsettled;
      each.draftCount = isGuessed ? Math.floor(this.#draw() * 6) : 0;
    }
    const [running, waiting] = [[...this.#running], [...this.#waiting]];
    const before = { running, waiting, blocksFree: this.#blocksFree, slotsFree: 64 - running.length, isAhead };
    const decision = schedule(before, this.#budget);
    check(decision, before, this.#budget);
    if (decision.rows.length === 0) return false;
    const oldest = this.#running.find(({ remaining }) => remaining > 0);
    if (oldest) expect(decision.rows.some(({ sequence }) => sequence === oldest)).toBe(true); // C2
    if (isAhead) this.#out.ahead++;
    this.#apply(decision);
    return true;
  }

  #apply({ preempt, admit, rows }: Decision<Fake>): void {
    this.#step++;
    for (const victim of preempt) {
      this.#running.splice(this.#running.indexOf(victim), 1);
      this.#blocksFree += victim.blocksHeld;
      this.#waiting.unshift(Object.assign(victim, { computed: 0, blocksHeld: 0, draftCount: 0 }));
    }
    for (const { sequence, blocks } of admit) {
      this.#waiting.shift();
      this.#blocksFree -= blocks;
      this.#running.push(Object.assign(sequence, { blocksHeld: blocks }));
    }
    this.#out.trace.push(JSON.stringify(rows.map(({ sequence, count, drafts }) => [sequence.id, count, drafts])));
    const launched = rows.map(({ sequence, count, drafts, sample, grow }) => {
      this.#blocksFree -= grow;
      sequence.blocksHeld += grow;
      sequence.computed += count;
      sequence.length += sample ? 1 : 0;
      sequence.remaining -= sample ? 1 : 0;
      sequence.isUnsettled = sample && this.#requests[sequence.id]?.guessed === true;
      return { sequence, drafts, sample, tokens: 1 + Math.floor(this.#draw() * (drafts + 1)) };
    });
    expect(this.#blocksFree).toBeGreaterThanOrEqual(0);
    this.#flights.push({ step: this.#step, rows: launched });
  }

  #land(): void {
    const flight = this.#flights.shift();
    if (flight === undefined) throw new Error("nothing is in flight");
    for (const { blocks } of this.#resting.filter(({ step }) => step <= flight.step)) this.#blocksFree += blocks;
    this.#resting = this.#resting.filter(({ step }) => step > flight.step);
    for (const { sequence, sample, tokens } of flight.rows) {
      if (!this.#running.includes(sequence)) this.#out.wasted++;
      else if (sample) this.#commit(sequence, tokens);
    }
  }

  #commit(sequence: Fake, tokens: number): void {
    const { prompt = 0, answer = 0, most = 0 } = this.#requests[sequence.id] ?? {};
    sequence.isUnsettled = false;
    sequence.length += tokens - 1;
    sequence.computed += tokens - 1;
    sequence.remaining -= tokens - 1;
    const isInFlight = this.#flights.some(({ rows }) => rows.some((row) => row.sequence === sequence && row.sample));
    const known = sequence.length - prompt - (isInFlight ? 1 : 0);
    const end = Math.min(answer, most);
    if (known < end) return;
    this.#running.splice(this.#running.indexOf(sequence), 1);
    this.#out.finished.push(sequence.id);
    this.#resting.push({ step: this.#step, blocks: sequence.blocksHeld });
    if (this.#flights.length > 0) return;
    for (const { blocks } of this.#resting.splice(0)) this.#blocksFree += blocks;
  }
}

const random = (seed: number) => () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 4294967296;
};

const scenario = fc.record({
  requests: fc.array(
    fc.record({
      prompt: fc.integer({ min: 1, max: 60 }),
      answer: fc.integer({ min: 1, max: 40 }),
      most: fc.integer({ min: 1, max: 40 }),
      guessed: fc.boolean(),
    }),
    { minLength: 1, maxLength: 20 },
  ),
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

const runOf = ({ requests, budget: given, spare, seed }: Scenario, depth: number) => {
  const longest = Math.max(...requests.map(({ prompt, most }) => prompt + most));
  const budget = { ...given, runningMax: runningLimit(given) };
  const blocksTotal = blocksFor(longest, budget.blockTokens) + spare;
  return new Simulation({ requests, budget, blocksTotal, depth, draw: random(seed) }).run();
};

describe("schedule", () => {
  test.each([1, 2])(
    "C1 to C5, %i step(s) in flight: never over budget, oldest first, what is admitted ends",
    (depth) => {
      fc.assert(
        fc.property(scenario, (given) => {
          const { finished } = runOf(given, depth);
          expect(finished.sort((a, b) => a - b)).toEqual(given.requests.map((_, id) => id));
        }),
        { numRuns: 100 },
      );
    },
  );

  test("running ahead wastes no row on what ends for certain", () => {
    let [ahead, wasted] = [0, 0];
    fc.assert(
      fc.property(scenario, (given) => {
        const [one, two] = [runOf(given, 1), runOf(given, 2)];
        expect(one.wasted).toBe(0);
        // One row at most for each that ended earlier than it had to.
        const early = given.requests.filter(({ answer, most }) => answer < most).length;
        expect(two.wasted).toBeLessThanOrEqual(early);
        ahead += two.ahead;
        wasted += two.wasted;
      }),
      { numRuns: 100 },
    );
    // Else the property has shown nothing.
    expect(ahead).toBeGreaterThan(100);
    expect(wasted).toBeGreaterThan(10);
  });

  test("the same state gives the same decision", () => {
    fc.assert(
      fc.property(scenario, (given) => {
        expect(runOf(given, 2).trace).toEqual(runOf(given, 2).trace);
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
    isUnsettled: false,
  });
  const fresh = (id: number, length: number): Fake => ({
    id,
    length,
    computed: 0,
    blocksHeld: 0,
    remaining: 50,
    draftCount: 0,
    isUnsettled: false,
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
