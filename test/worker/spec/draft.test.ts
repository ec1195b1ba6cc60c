// The draft worker with a real engine: what it answers, and that nothing that comes over the bus ends it.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import { DraftCommit, DraftOpen, Frame, Hello, Nack_Reason } from "../../../proto/gen/muster/v1/speculation.ts";
import type { Sampling } from "../../../proto/gen/muster/v1/worker.ts";
import { MemoryBus } from "../../../worker/spec/bus.ts";
import { extendAll, rootHash } from "../../../worker/spec/prefix-hash.ts";
import { closeGroup, Drafter, openGroup, readNano, sampled } from "../../cluster/in-process.ts";
import { until } from "../../until.ts";

const SOURCE = 0x77n;
const DRAFT_TOKENS = 4;
const PROMPT = [2042, 300, 512, 77, 1033, 9];

/** The target's end of the bus, by hand. */
class Target {
  readonly bus: MemoryBus;
  readonly #vocabHash: bigint;
  #subject = "";
  #answers: Frame[] = [];

  constructor(bus: MemoryBus, model: ModelSpec) {
    this.bus = bus;
    this.#vocabHash = model.tokenizer?.vocabHash ?? 0n;
    bus.subscribe("spec.v1.pool.*.hello", (data) => {
      this.#subject = Hello.decode(data).subject;
    });
    bus.subscribe(`spec.v1.t.${SOURCE.toString(16).padStart(16, "0")}.p`, (data) =>
      this.#answers.push(Frame.decode(data)),
    );
  }

  open(session: number, more: Partial<DraftOpen> = {}): DraftOpen {
    const open = DraftOpen.fromPartial({
      session,
      tokens: PROMPT,
      generatedFrom: 2,
      sampling: sampled(0),
      vocabHash: this.#vocabHash,
      draftTokens: DRAFT_TOKENS,
      ...more,
    });
    const { low, high } = this.#hashOf(open, open.tokens);
    return { ...open, hashLow: low, hashHigh: high };
  }

  commit(open: DraftOpen, tokens: number[], base: number): DraftCommit {
    const { session, generation, draftTokens } = open;
    const { low, high } = this.#hashOf(open, [...open.tokens.slice(0, base), ...tokens]);
    return DraftCommit.create({ session, generation, draftTokens, base, tokens, hashLow: low, hashHigh: high });
  }

  async send(frame: Partial<Frame>): Promise<void> {
    await until(() => this.#subject !== "", "the draft has said hello");
    this.bus.publish(this.#subject, Frame.encode(Frame.fromPartial({ source: SOURCE, ...frame })).finish());
  }

  /** What the draft says of this session next: guesses, or why not. */
  async heard(session: number): Promise<number[] | Nack_Reason> {
    let found: number[] | Nack_Reason | undefined;
    await until(() => {
      for (const { hints, nacks } of this.#answers.splice(0))
        found ??=
          hints.find((hint) => hint.session === session)?.tokens ??
          nacks.find((nack) => nack.session === session)?.reason;
      return found !== undefined;
    }, `the draft answers session ${session}`);
    return found ?? [];
  }

  async ask(session: number, more: Partial<DraftOpen> = {}): Promise<number[] | Nack_Reason> {
    await this.send({ opens: [this.open(session, more)] });
    return this.heard(session);
  }

  async hint(session: number, more: Partial<DraftOpen> = {}): Promise<number[]> {
    const answer = await this.ask(session, more);
    if (!Array.isArray(answer)) throw new Error(`session ${session} was refused with ${answer}`);
    return answer;
  }

  #hashOf({ sampling, seedLow, seedHigh }: DraftOpen, tokens: number[]) {
    return extendAll(rootHash(this.#vocabHash, { sampling: sampling ?? sampled(0), seedLow, seedHigh }), tokens);
  }
}

describe("a draft worker", () => {
  let model: ModelSpec;
  let bus: MemoryBus;
  let target: Target;
  let drafter: Drafter;
  let guesses: number[];

  beforeAll(async () => {
    model = await readNano("nano-draft");
    bus = new MemoryBus();
    target = new Target(bus, model);
    drafter = await Drafter.start(model, bus);
    guesses = await target.hint(1);
  });
  afterAll(async () => {
    await drafter.kill(); // rejects where the worker had failed in one of the tests
    await bus.close();
  });

  test("guesses what its model would say next", async () => {
    const group = await openGroup(model);
    const blocks = [1, 2];
    const value = {
      ids: PROMPT,
      generatedFrom: 2,
      seedLow: 0n,
      seedHigh: 0n,
      sampling: sampled(0),
      computed: 0,
      blocks,
    };
    const said: number[] = [];
    for (let i = 0; i < DRAFT_TOKENS; i++) {
      const updates = i === 0 ? [{ slot: 1, kind: { $case: "open" as const, value } }] : [];
      const count = i === 0 ? PROMPT.length : 1;
      const row = { slot: 1, count, drafts: [], sample: true, logprobs: 0, logits: false, margins: false };
      const result = await group.engine.launch({ step: BigInt(i + 1), updates, rows: [row], incarnation: 0n });
      said.push(...(result.rows[0]?.tokens ?? []));
    }
    await closeGroup(group);
    expect(guesses).toEqual(said);
  });

  test("D2: after its guesses have come true it goes on where they ended, and after others from there", async () => {
    const open = target.open(2);
    expect(await target.ask(2)).toEqual(guesses);
    await target.send({ commits: [target.commit(open, guesses.slice(0, 2), PROMPT.length)] });
    const next = await target.heard(2);
    expect(Array.isArray(next) && next.slice(0, 2)).toEqual(guesses.slice(2));
    // Taken back: other tokens in place of the committed ones.
    await target.send({ commits: [target.commit(open, [5, 6], PROMPT.length)] });
    expect(await target.heard(2)).toEqual(await target.hint(3, { tokens: [...PROMPT, 5, 6] }));
  });

  test("D1: a commit that does not fit changes nothing and is answered by a NACK", async () => {
    const open = target.open(4);
    await target.ask(4);
    const wrong = [
      { commit: { ...target.commit(open, [5], PROMPT.length), base: 40 }, reason: Nack_Reason.GAP },
      { commit: { ...target.commit(open, [5], PROMPT.length), hashLow: 1 }, reason: Nack_Reason.HASH },
      { commit: target.commit(open, [4_000_000], PROMPT.length), reason: Nack_Reason.HASH },
      { commit: target.commit(open, [], 0), reason: Nack_Reason.HASH },
      { commit: { ...target.commit(open, [5], PROMPT.length), generation: 9 }, reason: Nack_Reason.UNKNOWN_SESSION },
    ];
    for (const { commit, reason } of wrong) {
      await target.send({ commits: [commit] });
      expect(await target.heard(4)).toBe(reason);
    }
    await target.send({ commits: [target.commit(open, guesses.slice(0, 1), PROMPT.length)] });
    expect((await target.heard(4)).toString()).toContain(guesses.slice(1).toString());
  });

  test("a commit without news gets the hint again", async () => {
    const open = target.open(5);
    expect(await target.ask(5)).toEqual(guesses);
    await target.send({ commits: [target.commit(open, [], PROMPT.length)] });
    expect(await target.heard(5)).toEqual(guesses);
  });

  test("an OPEN that comes again after its commits takes nothing back; one of a new generation does", async () => {
    const open = target.open(6);
    await target.ask(6);
    await target.send({ commits: [target.commit(open, [5], PROMPT.length)] });
    await target.heard(6);
    const news = target.commit({ ...open, tokens: [...PROMPT, 5] }, [6], PROMPT.length + 1);
    await target.send({ opens: [open], commits: [news] });
    expect(await target.heard(6)).toEqual(await target.hint(7, { tokens: [...PROMPT, 5, 6] }));
    expect(await target.ask(6, { generation: 1 })).toEqual(guesses);
  });

  const bad: [string, Partial<DraftOpen>, Nack_Reason][] = [
    ["no token", { tokens: [], generatedFrom: 0 }, Nack_Reason.HASH],
    ["an id outside the vocabulary", { tokens: [2048] }, Nack_Reason.HASH],
    ["a prompt longer than the prefix", { generatedFrom: 7 }, Nack_Reason.HASH],
    ["another vocabulary", { vocabHash: 1n }, Nack_Reason.FULL],
    ["a context that the guesses would leave", { tokens: Array(2045).fill(7) }, Nack_Reason.FULL],
    ...[Number.NaN, -1, 1e-9, Number.POSITIVE_INFINITY].map(
      (temperature): [string, Partial<DraftOpen>, Nack_Reason] => [
        `temperature ${temperature}`,
        { sampling: sampled(temperature) },
        Nack_Reason.HASH,
      ],
    ),
    ...[
      { repetitionPenalty: 0 },
      { repetitionPenalty: Number.NaN },
      { presencePenalty: Number.NEGATIVE_INFINITY },
      { frequencyPenalty: Number.NaN },
      { logitBias: [{ id: 2048, bias: 1 }] },
      { logitBias: [{ id: 1, bias: Number.NaN }] },
      { logitBias: Array.from({ length: 1025 }, (_, id) => ({ id, bias: 1 })) },
    ].map((more: Partial<Sampling>): [string, Partial<DraftOpen>, Nack_Reason] => [
      `${Object.keys(more)} of no sense`,
      { sampling: sampled(1, more) },
      Nack_Reason.HASH,
    ]),
  ];
  test.each(bad)("D5: an OPEN with %s is refused, and the draft goes on", async (_, more, reason) => {
    expect(await target.ask(20, more)).toBe(reason);
    expect(await target.ask(21, { generation: 100 + bad.findIndex(([, each]) => each === more) })).toEqual(guesses);
  });

  test("D5: an OPEN without sampling, with another hash, or up to the last token of the context", async () => {
    await target.send({ opens: [{ ...target.open(22), sampling: undefined }] });
    expect(await target.heard(22)).toBe(Nack_Reason.HASH);
    await target.send({ opens: [{ ...target.open(22), hashHigh: 1 }] });
    expect(await target.heard(22)).toBe(Nack_Reason.HASH);
    expect(await target.hint(22, { tokens: Array(2044).fill(7) })).toHaveLength(DRAFT_TOKENS);
  });

  test("D3: sessions that end make room for others in the same frame", async () => {
    const free = 127 - drafter.worker.sessions;
    const first = Array.from({ length: free }, (_, i) => target.open(1000 + i));
    await target.send({ opens: first });
    await target.heard(1000 + free - 1);
    expect(await target.ask(5000)).toBe(Nack_Reason.FULL);
    const closes = first.map(({ session, generation }) => ({ session, generation }));
    await target.send({ closes });
    const second = Array.from({ length: free }, (_, i) => target.open(2000 + i));
    await target.send({ closes, opens: second });
    expect(await target.heard(2000 + free - 1)).toEqual(guesses);
    expect(drafter.worker.sessions).toBe(127);
  });
});
