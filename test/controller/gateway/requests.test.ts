// The pure core alone: every place a stream can break, against the log that a client has.
import fc from "fast-check";
import { expect, test } from "vitest";
import { RESUMES_MAX } from "../../../controller/gateway/limits.ts";
import {
  absorb,
  type Choice,
  heldSince,
  holdChoice,
  holdFault,
  type Kin,
  makeChoice,
  openChoice,
} from "../../../controller/gateway/requests.ts";
import { lost, waiting } from "../../../proto/fault.ts";
import { type Chunk, type Fault, Finish_Reason } from "../../../proto/gen/muster/v1/worker.ts";

const terms = {
  sampling: {
    temperature: 1,
    topK: 0,
    topP: 1,
    minP: 0,
    repetitionPenalty: 1,
    presencePenalty: 0,
    frequencyPenalty: 0,
    logitBias: [],
  },
  maxTokens: 0,
  minTokens: 0,
  stop: [],
  ignoreEos: false,
  logprobs: 0,
  speculation: true,
};
const fresh = (kin: Kin = { revision: undefined }): Choice => {
  const input = { $case: "text", value: "hi" } as const;
  return makeChoice({ index: 0, input, seed: { low: 1n, high: 2n }, terms, sticky: "", kin }, 0);
};
const expired = (choice: Choice, now: number) => holdFault(choice, now, { comingMs: 1000, holdMs: 1000 }, "");
const chunk = (part: Partial<Chunk>): Chunk => ({ id: 1, tokens: [], text: "", logprobs: [], margins: [], ...part });
const opened = { prompt: [5, 6], revision: "r", numericsId: "n" };
const faulted = (fault: Fault): Chunk =>
  chunk({
    finish: {
      reason: Finish_Reason.FAULT,
      fault,
      drafted: 0,
      accepted: 0,
      targetSteps: 0,
      stop: "",
      numericsChanged: false,
    },
  });

test("G1, G2: wherever it breaks, the re-opening says exactly what was absorbed", () => {
  const piece = fc.record({ tokens: fc.array(fc.nat(99), { maxLength: 4 }), text: fc.string({ unit: "grapheme" }) });
  const run = fc.array(
    fc.oneof({ weight: 4, arbitrary: piece }, { weight: 1, arbitrary: fc.constant("break" as const) }),
  );
  fc.assert(
    fc.property(run, (events) => {
      const choice = fresh();
      openChoice(choice, 1);
      absorb(choice, chunk({ opened }), 1);
      const tokens: number[] = [];
      let text = "";
      let breaks = 0;
      for (const event of events) {
        if (event !== "break") {
          absorb(choice, chunk(event), 1);
          tokens.push(...event.tokens);
          text += event.text;
          continue;
        }
        if (++breaks > RESUMES_MAX) break;
        holdChoice(choice, 2);
        const open = openChoice(choice, 1 + breaks);
        expect(open).toMatchObject({ generated: tokens, textSent: text.length, seedLow: 1n, seedHigh: 2n });
        expect(open.input).toEqual({ $case: "prompt", value: { ids: opened.prompt } });
        absorb(choice, chunk({ opened }), 3);
      }
      expect(choice.resumes).toBe(Math.min(breaks, RESUMES_MAX));
    }),
  );
});

test("G5: what opens on another revision than its request is held again, without a token of it", () => {
  const kin: Kin = { revision: undefined };
  const [first, second] = [fresh(kin), fresh(kin)];
  for (const choice of [first, second]) openChoice(choice, 1);
  expect(absorb(first, chunk({ opened }), 1)).toBe("going");
  expect(absorb(second, chunk({ opened: { ...opened, revision: "other" }, tokens: [1], text: "x" }), 1)).toBe("hold");
  expect(second).toMatchObject({ state: { kind: "held" }, generated: [], textSent: 0, origin: undefined });
  openChoice(second, 2);
  expect(absorb(second, chunk({ opened }), 2)).toBe("going");
  expect(second.origin?.revision).toBe("r");
});

test("G4: a hold runs on through openings that no leader answers, and ends with the answer", () => {
  const choice = fresh();
  expect(expired(choice, 999)).toBeUndefined();
  openChoice(choice, 1);
  holdChoice(choice, 500);
  expect(heldSince(choice)).toBe(0);
  expect(expired(choice, 1000)).toMatchObject({ code: "model_not_serving" });
  openChoice(choice, 2);
  absorb(choice, chunk({ opened }), 600);
  expect(heldSince(choice)).toBeUndefined();
  expect(expired(choice, 1_000_000)).toBeUndefined();
  holdChoice(choice, 2_000_000);
  openChoice(choice, 3);
  absorb(choice, chunk({ opened }), 2_000_600);
  holdChoice(choice, 3_000_000);
  expect(expired(choice, 3_000_399)).toBeUndefined();
  expect(expired(choice, 3_000_400)).toMatchObject({ code: "hold_expired" });
});

test("G4: before the first answer the time of coming counts, after it the hold time; the cause is said", () => {
  const bounds = { comingMs: 600_000, holdMs: 1000 };
  const choice = fresh();
  expect(holdFault(choice, 599_999, bounds, "")).toBeUndefined();
  expect(holdFault(choice, 600_000, bounds, "loading: 3 of 9 GB")?.detail).toContain("600 s (loading: 3 of 9 GB)");
  openChoice(choice, 1);
  absorb(choice, chunk({ opened }), 500_000);
  holdChoice(choice, 500_000);
  expect(holdFault(choice, 500_999, bounds, "")).toBeUndefined();
  expect(holdFault(choice, 501_000, bounds, "")).toMatchObject({ code: "hold_expired" });
});

test("G4: a token gives the whole hold time again", () => {
  const choice = fresh();
  openChoice(choice, 1);
  absorb(choice, chunk({ opened, tokens: [1] }), 900);
  holdChoice(choice, 900);
  expect(expired(choice, 1899)).toBeUndefined();
  expect(expired(choice, 1900)).toBeDefined();
});

test("a full queue refuses who is new and holds who was in", () => {
  const full = faulted(waiting("queue_full", "full"));
  const choice = fresh();
  openChoice(choice, 1);
  expect(absorb(choice, full, 1)).toBe("over");
  const older = fresh();
  openChoice(older, 1);
  absorb(older, chunk({ opened }), 1);
  holdChoice(older, 1);
  openChoice(older, 2);
  expect(absorb(older, full, 1)).toBe("hold");
});

test("each kind of fault: invalid ends, everything else holds", () => {
  const kinds: [Fault, string][] = [
    [{ kind: 1, field: "prompt", detail: "", code: "x" }, "over"],
    [waiting("draining", ""), "hold"],
    [{ kind: 3, field: "", detail: "", code: "x" }, "hold"],
    [lost("engine_lost", ""), "hold"],
  ];
  for (const [fault, verdict] of kinds) {
    const choice = fresh();
    openChoice(choice, 1);
    absorb(choice, chunk({ opened }), 1);
    expect({ fault, verdict: absorb(choice, faulted(fault), 1) }).toEqual({ fault, verdict });
  }
});

test("G3: another revision ends the stream, another numerics id marks it", () => {
  const choice = fresh();
  openChoice(choice, 1);
  absorb(choice, chunk({ opened }), 1);
  holdChoice(choice, 1);
  openChoice(choice, 2);
  absorb(choice, chunk({ opened: { ...opened, numericsId: "other" } }), 1);
  expect(choice.numericsChanged).toBe(true);
  holdChoice(choice, 1);
  openChoice(choice, 3);
  expect(absorb(choice, chunk({ opened: { ...opened, revision: "other" } }), 1)).toBe("over");
  expect(choice.state).toMatchObject({ kind: "failed", fault: { code: "revision_changed" } });
});

test("steps of a leader that died are counted from what was seen, those of the last as it says", () => {
  const choice = fresh();
  openChoice(choice, 1);
  absorb(choice, chunk({ opened, tokens: [1, 2, 3] }), 1);
  absorb(choice, chunk({ tokens: [4] }), 1);
  holdChoice(choice, 1);
  openChoice(choice, 2);
  const finish = {
    reason: Finish_Reason.STOP,
    fault: undefined,
    drafted: 9,
    accepted: 4,
    targetSteps: 5,
    stop: "",
    numericsChanged: false,
  };
  absorb(choice, chunk({ opened, tokens: [5], finish }), 1);
  expect(choice.tally).toEqual({ drafted: 2 + 9, accepted: 2 + 4, targetSteps: 2 + 5 });
});
