// A leader over the native engine with a native draft on a bus in memory: speculation changes the number of steps, nothing else.
import { afterAll, beforeAll, expect, test } from "vitest";
import { type Chunk, type Finish, Open } from "../../../proto/gen/muster/v1/worker.ts";
import type { Engine } from "../../../worker/engine/engine.ts";
import { noFollowers } from "../../../worker/serve/followers.ts";
import { Leader } from "../../../worker/serve/leader.ts";
import { Outlet } from "../../../worker/serve/outlet.ts";
import { MemoryBus } from "../../../worker/spec/bus.ts";
import { type DraftWorker, startDraft } from "../../../worker/spec/draft.ts";
import type { Speculator } from "../../../worker/spec/speculator.ts";
import { createSpeculator } from "../../../worker/spec/target.ts";
import { openPlaced, readPlaced } from "../engine/open.ts";
import { sampled, tokenizer } from "./harness.ts";

const KV_BLOCKS = 40;
const BLOCK_TOKENS = 16;
const TOKENS = 72;
const VOCAB = 2048;

let engines: Engine[] = [];
let draft: DraftWorker | undefined;
let speculator: Speculator | undefined;
let leader: Leader | undefined;
let ended: Promise<void> | undefined;
beforeAll(async () => {
  const [target, small] = await Promise.all(
    ["test/models/nano-maverick/", "test/models/nano-draft/"].map(async (path) => openPlaced(await readPlaced(path))),
  );
  if (target === undefined || small === undefined) throw new Error("the engines were not opened");
  engines = [target, small];
  const bus = new MemoryBus();
  const shared = { bus, pool: "p", vocabHash: 11n };
  draft = startDraft({
    ...shared,
    engine: small,
    model: "nano-draft",
    vocabSize: VOCAB,
    contextTokens: 256,
    kvBlocks: KV_BLOCKS,
    kvBlockTokens: BLOCK_TOKENS,
    tokensMax: 128,
    rowsMax: 8,
    sessionsMax: 6,
  });
  speculator = createSpeculator({ ...shared, draftTokens: 4, waitMs: 2_000 });
  leader = new Leader({
    engine: target,
    tokenizer,
    speculator,
    followers: noFollowers,
    incarnation: 1n,
    revision: "r",
    budget: { tokensMax: 128, rowsMax: 8, verifyMax: 4, runningMax: 4, blockTokens: BLOCK_TOKENS },
    limits: { vocabSize: VOCAB, lengthMax: 256, lengthLimit: "context", logprobsMax: 0, stopIds: [] },
    kvBlocks: KV_BLOCKS,
    slotsMax: 8,
    queueMax: 16,
  });
  ended = leader.run();
});
afterAll(async () => {
  leader?.stop();
  await ended;
  await speculator?.stop();
  await draft?.stop();
  for (const engine of engines) await engine.close();
});

function answers(opens: Partial<Open>[]): Promise<{ tokens: number[]; text: string; finish: Finish }[]> {
  const running = leader;
  if (running === undefined) throw new Error("the leader was not started");
  const chunks = opens.map((): Chunk[] => []);
  return new Promise((resolve) => {
    let left = opens.length;
    const outlet = new Outlet((response) => {
      for (const chunk of response.chunks) {
        chunks[chunk.id]?.push(chunk);
        if (chunk.finish && --left === 0) resolve(chunks.map(joined));
      }
    });
    for (const [id, open] of opens.entries()) void running.open(outlet, Open.fromPartial({ ...open, id }));
  });
}

function joined(chunks: Chunk[]) {
  const finish = chunks.at(-1)?.finish;
  if (finish === undefined) throw new Error("a sequence has no finish");
  return { tokens: chunks.flatMap(({ tokens }) => tokens), text: chunks.map(({ text }) => text).join(""), finish };
}

test.each([0, 0.8])("temperature %d: the same tokens and text in fewer steps", async (temperature) => {
  const opens = ["Mr. Speaker, Mr. President", "The state of the Union", "We", "In my message to the Congress"].map(
    (value, index): Partial<Open> => ({
      input: { $case: "text", value },
      maxTokens: TOKENS,
      sampling: sampled(temperature),
      seedLow: BigInt(index + 1),
      seedHigh: 5n,
    }),
  );
  const off = await answers(opens);
  const on = await answers(opens.map((open) => ({ ...open, speculation: true })));
  expect(on.map(({ tokens, text }) => ({ tokens, text }))).toEqual(off.map(({ tokens, text }) => ({ tokens, text })));
  const sum = (pick: (finish: Finish) => number) => on.reduce((total, { finish }) => total + pick(finish), 0);
  const perStep = (4 * TOKENS) / sum(({ targetSteps }) => targetSteps);
  expect(off.every(({ finish }) => finish.drafted === 0 && finish.targetSteps === TOKENS - 1)).toBe(true);
  expect(sum(({ accepted }) => accepted)).toBeLessThanOrEqual(sum(({ drafted }) => drafted));
  expect(perStep).toBeGreaterThan(1.8);
});
