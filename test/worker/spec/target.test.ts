// The target's side of speculation against a draft that the test plays by hand over a bus in memory.
import { describe, expect, test } from "vitest";
import { Frame, Hello, type Hint, type Nack, Nack_Reason } from "../../../proto/gen/muster/v1/speculation.ts";
import { MemoryBus } from "../../../worker/spec/bus.ts";
import type { SpeculatedSequence } from "../../../worker/spec/speculator.ts";
import { createSpeculator } from "../../../worker/spec/target.ts";
import { sampled } from "../../cluster/in-process.ts";

const VOCAB = 9n;
const WAIT_MS = 2_000;
const NATS_PAYLOAD_MAX = 1024 * 1024;

type Reply = { hints?: Hint[]; nacks?: Nack[] };

/** A speculator and, on its bus, a draft that answers each frame by `reply`. */
function bed(reply: (frame: Frame, count: number) => Reply, waitMs = WAIT_MS) {
  const bus = new MemoryBus();
  const frames: Frame[] = [];
  const sizes: number[] = [];
  const speculator = createSpeculator({ bus, pool: "p", vocabHash: VOCAB, draftTokens: 4, waitMs });
  bus.subscribe("spec.v1.d.draft.c", (data) => {
    const frame = Frame.decode(data);
    frames.push(frame);
    sizes.push(data.length);
    const answer = Frame.fromPartial({ source: 1n, ...reply(frame, frames.length) });
    bus.publish(`spec.v1.t.${frame.source.toString(16).padStart(16, "0")}.p`, Frame.encode(answer).finish());
  });
  const hello = Hello.create({ source: 1n, epoch: 1, vocabHash: VOCAB, subject: "spec.v1.d.draft.c" });
  bus.publish("spec.v1.pool.p.hello", Hello.encode(hello).finish());
  return { speculator, frames, sizes, heard: () => new Promise((wake) => setImmediate(() => setImmediate(wake))) };
}

const sequence = (session: number, tokens: number[]): SpeculatedSequence => ({
  session,
  tokens,
  generatedFrom: tokens.length,
  seedLow: 0n,
  seedHigh: 0n,
  sampling: sampled(0),
});

const hintsFor = (frame: Frame, tokens: number[]): Hint[] =>
  [...frame.opens, ...frame.commits].map(({ session, generation, hashLow, hashHigh }) => ({
    session,
    generation,
    hashLow,
    hashHigh,
    tokens,
  }));

const nacksFor = (frame: Frame, reason: Nack_Reason): Nack[] =>
  [...frame.opens, ...frame.commits].map(({ session, generation }) => ({ session, generation, reason }));

describe("speculator", () => {
  test("T2: what a step has to say is one frame", async () => {
    const { speculator, frames, heard } = bed((frame) => ({ hints: hintsFor(frame, [1, 2, 3]) }));
    await heard();
    for (let i = 1; i <= 20; i++) speculator.open(sequence(i, [i, i]));
    const all = Array.from({ length: 20 }, (_, i) => i + 1);
    expect(await speculator.drafts(all)).toEqual(all.map(() => [1, 2, 3]));
    expect(frames).toHaveLength(1);
    for (const id of all) speculator.commit(id, [id, id, 1, 9], 2);
    expect(await speculator.drafts(all)).toEqual(all.map(() => [1, 2, 3]));
    expect(frames.map(({ opens, commits }) => [opens.length, commits.length])).toEqual([
      [20, 0],
      [0, 20],
    ]);
  });

  test("T2: prefixes that are too long for one message of the bus go in several, each of which fits", async () => {
    const { speculator, frames, sizes, heard } = bed((frame) => ({ hints: hintsFor(frame, [1]) }));
    await heard();
    const all = [1, 2, 3, 4, 5];
    for (const id of all) speculator.open(sequence(id, Array(120_000).fill(2 ** 31 + id)));
    expect(await speculator.drafts(all)).toEqual(all.map(() => [1]));
    expect(frames.map(({ opens }) => opens.length)).toEqual([1, 1, 1, 1, 1]);
    expect(Math.max(...sizes)).toBeLessThan(NATS_PAYLOAD_MAX);
    // One that fits no message is not spoken of.
    speculator.open(sequence(6, Array(250_000).fill(7)));
    expect(await speculator.drafts([6])).toEqual([[]]);
    expect(frames).toHaveLength(5);
  });

  test("T3: a session that the draft has forgotten is opened again within the step, once", async () => {
    const { speculator, frames, heard } = bed((frame, count) =>
      count === 2
        ? { nacks: nacksFor(frame, Nack_Reason.UNKNOWN_SESSION) }
        : { hints: hintsFor(frame, [count, count, count]) },
    );
    await heard();
    speculator.open(sequence(1, [5]));
    expect(await speculator.drafts([1])).toEqual([[1, 1, 1]]);
    speculator.commit(1, [5, 6], 1);
    expect(await speculator.drafts([1])).toEqual([[3, 3, 3]]);
    expect(frames.map(({ opens }) => opens.map(({ tokens, generation }) => ({ tokens, generation })))).toEqual([
      [{ tokens: [5], generation: 0 }],
      [],
      [{ tokens: [5, 6], generation: 1 }],
    ]);
  });

  test("T1, T3: a draft that forgets whatever it is told is asked twice in a step, and waited for no longer than waitMs", async () => {
    const { speculator, frames, heard } = bed((frame) => ({ nacks: nacksFor(frame, Nack_Reason.GAP) }), 100);
    await heard();
    speculator.open(sequence(1, [5]));
    const before = performance.now();
    expect(await speculator.drafts([1])).toEqual([[]]);
    expect(performance.now() - before).toBeLessThan(WAIT_MS / 2);
    expect(frames).toHaveLength(2);
  });

  test("a session that the draft has no room for is neither waited for nor spoken of again", async () => {
    const { speculator, frames, heard } = bed((frame) => ({ nacks: nacksFor(frame, Nack_Reason.FULL) }), 60_000);
    await heard();
    speculator.open(sequence(1, [5]));
    expect(await speculator.drafts([1])).toEqual([[]]);
    speculator.commit(1, [5, 6], 1);
    expect(await speculator.drafts([1])).toEqual([[]]);
    expect(frames).toHaveLength(1);
  });

  test("guesses that a scheduler had no room for do not count against the draft; wrong ones do", async () => {
    const rounds = 60;
    const run = async (next: number) => {
      const { speculator, heard } = bed((frame) => ({ hints: hintsFor(frame, [7, 7, 7]) }));
      await heard();
      const tokens = [5];
      speculator.open(sequence(1, tokens));
      let handedOut = 0;
      for (let i = 0; i < rounds; i++) {
        const [drafts] = await speculator.drafts([1]);
        if (drafts && drafts.length > 0) handedOut++;
        tokens.push(next);
        speculator.commit(1, tokens, 1); // nothing was verified: one own token
      }
      return handedOut;
    };
    expect(await run(7)).toBe(rounds);
    expect(await run(4)).toBeLessThan(rounds / 2);
  });
});
