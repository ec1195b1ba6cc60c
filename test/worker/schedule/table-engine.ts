// A genuine tiny engine in TypeScript: slots, paged KV, verification, penalties and seeds as native/include/muster/engine.h
// states them, over a language model that is a hash of the last `window` tokens. It reads those tokens from its KV blocks
// through the slot's table, so that a block freed too early, shared by mistake or never filled changes the answer.

import type { ExpertMap } from "../../../proto/gen/muster/v1/plan.ts";
import type { Row, Sampling, SlotUpdate, StepPlan } from "../../../proto/gen/muster/v1/worker.ts";
import {
  type Engine,
  EngineError,
  type RowResult,
  type StepResult,
  type TokenDetail,
} from "../../../worker/engine/engine.ts";

export type TableOptions = {
  vocab: number;
  blocks: number;
  blockTokens: number;
  rowsMax: number;
  tokensMax: number;
  verifyMax: number;
  slotsMax: number;
  /** Context of the model in tokens; Infinity reads the whole prefix. */
  window: number;
  /** Ids with extra weight, to make a stop id likely. */
  boost?: ReadonlyMap<number, number>;
};

type Slot = {
  ids: number[];
  computed: number;
  blocks: number[];
  generatedFrom: number;
  seed: number;
  sampling: Sampling | undefined;
};

const CANDIDATES = 24;

const mix = (a: number, b: number): number => {
  let h = Math.imul(a ^ (b + 0x9e3779b9 + (a << 6) + (a >>> 2)), 0x85ebca6b);
  h ^= h >>> 13;
  h = Math.imul(h, 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
};
const unit = (h: number): number => (h + 0.5) / 4294967296;

const refuse = (field: string, detail: string): never => {
  throw new EngineError({ code: "invalid", field, detail, rank: -1 });
};

export class TableEngine implements Engine {
  numericsId = "table-1";
  experts: ExpertMap | undefined;
  #staged: ExpertMap | undefined;
  readonly options: TableOptions;
  /** What happened, for assertions. */
  readonly seen = { steps: 0, ahead: 0, rows: 0, tokensMost: 0, rowsMost: 0, opens: 0 };
  #slots = new Map<number, Slot>();
  #kv: Int32Array;
  #owner: Int32Array;
  #inFlight = 0;
  /** Slots with a verify row in flight: nobody knows their lengths yet. */
  #verifying = new Set<number>();
  #last = 0n;
  #isClosed = false;

  constructor(options: TableOptions) {
    this.options = options;
    this.#kv = new Int32Array(options.blocks * options.blockTokens).fill(-1);
    this.#owner = new Int32Array(options.blocks);
  }

  get openSlots(): number {
    return this.#slots.size;
  }

  launch(plan: StepPlan): Promise<StepResult> {
    let result: StepResult;
    try {
      result = this.#step(plan);
    } catch (error) {
      return Promise.reject(error);
    }
    if (this.#inFlight++ > 0) this.seen.ahead++;
    const verifying = plan.rows.filter(({ drafts }) => drafts.length > 0).map(({ slot }) => slot);
    for (const slot of verifying) this.#verifying.add(slot);
    return new Promise((resolve) =>
      setImmediate(() => {
        this.#inFlight--;
        for (const slot of verifying) this.#verifying.delete(slot);
        resolve(result);
      }),
    );
  }

  memory() {
    return [{ weights: 0, kv: this.#kv.byteLength, activations: 0, communication: 0 }];
  }

  expertTokens(): number[][] {
    return [];
  }

  async stage(map: ExpertMap): Promise<void> {
    this.#staged = map;
  }

  async close(): Promise<void> {
    this.#isClosed = true;
  }

  #step(plan: StepPlan): StepResult {
    const { rowsMax, tokensMax, verifyMax } = this.options;
    if (this.#isClosed) throw new EngineError({ code: "lost", field: "engine", detail: "closed", rank: -1 });
    if (this.#inFlight >= 2) refuse("step", "too many in flight");
    if (plan.step !== this.#last + 1n) refuse("step", `expected ${this.#last + 1n}, got ${plan.step}`);
    this.#last = plan.step;
    if (plan.rows.length > rowsMax) refuse("rows", `${plan.rows.length} > ${rowsMax}`);
    const tokens = plan.rows.reduce((sum, row) => sum + row.count + row.drafts.length, 0);
    if (tokens > tokensMax) refuse("tokens", `${tokens} > ${tokensMax}`);
    if (plan.rows.some((row) => row.drafts.length > verifyMax)) refuse("drafts", "too many");
    if (new Set(plan.rows.map((row) => row.slot)).size !== plan.rows.length) refuse("rows", "slot twice");
    for (const { slot } of [...plan.updates, ...plan.rows])
      if (this.#verifying.has(slot)) refuse("slot", `${slot} has a verify row in flight`);
    for (const update of plan.updates) this.#update(update);
    const rows = plan.rows.map((row) => this.#row(row));
    this.seen.steps++;
    this.seen.rows += rows.length;
    this.seen.tokensMost = Math.max(this.seen.tokensMost, tokens);
    this.seen.rowsMost = Math.max(this.seen.rowsMost, rows.length);
    return { step: plan.step, rows, digest: digestOf(plan.rows, rows), stepMs: 0, waitMs: 0 };
  }

  #slot(id: number): Slot {
    return this.#slots.get(id) ?? refuse("slot", `${id} is not open`);
  }

  #attach(id: number, blocks: readonly number[]): void {
    for (const block of blocks) {
      if (block <= 0 || block >= this.options.blocks) refuse("blocks", `${block} out of range`);
      if (this.#owner[block] !== 0) refuse("blocks", `${block} belongs to slot ${this.#owner[block]}`);
      this.#owner[block] = id;
      const { blockTokens } = this.options;
      this.#kv.fill(-1, block * blockTokens, (block + 1) * blockTokens);
    }
  }

  #update(update: SlotUpdate): void {
    const { slot: id, kind } = update;
    if (kind?.$case === "experts") {
      const { version } = kind.value;
      if (version !== this.#staged?.version) refuse("experts", `${version} is not staged`);
      this.experts = this.#staged;
      this.numericsId = `table-1-x${version}`;
      this.#staged = undefined;
      return;
    }
    if (id <= 0 || id >= this.options.slotsMax) refuse("slot", `${id} out of range`);
    switch (kind?.$case) {
      case "open": {
        if (this.#slots.has(id)) refuse("slot", `${id} is open already`);
        const { ids, blocks, generatedFrom, seedLow, seedHigh, sampling, computed } = kind.value;
        if (computed !== 0) refuse("computed", "this engine has no prefix reuse");
        this.#attach(id, blocks);
        const seed = mix(Number(seedLow & 0xffffffffn), mix(Number(seedLow >> 32n), Number(seedHigh & 0xffffffffn)));
        this.#slots.set(id, { ids: [...ids], computed, blocks: [...blocks], generatedFrom, seed, sampling });
        this.seen.opens++;
        return;
      }
      case "close":
        for (const block of this.#slot(id).blocks) this.#owner[block] = 0;
        this.#slots.delete(id);
        return;
      case "blocks":
        this.#attach(id, kind.value.blocks);
        this.#slot(id).blocks.push(...kind.value.blocks);
        return;
      case "truncate": {
        const slot = this.#slot(id);
        slot.ids.length = Math.min(slot.ids.length, kind.value.length);
        slot.computed = Math.min(slot.computed, slot.ids.length);
        return;
      }
      default:
        refuse("kind", `${kind?.$case} is not supported`);
    }
  }

  #cell(slot: Slot, position: number): number {
    const { blockTokens } = this.options;
    const block = slot.blocks[Math.floor(position / blockTokens)];
    if (block === undefined) return refuse("blocks", `no block for position ${position}`);
    return block * blockTokens + (position % blockTokens);
  }

  #row(row: Row): RowResult {
    const slot = this.#slot(row.slot);
    if (row.count < 1 || slot.computed + row.count > slot.ids.length) refuse("count", `${row.count}`);
    if (row.sample && slot.computed + row.count !== slot.ids.length) refuse("sample", "not at the end");
    if (!row.sample && row.drafts.length > 0) refuse("drafts", "without sample");
    if (!row.sample && (row.logprobs > 0 || row.margins)) refuse("logprobs", "without sample");
    const first = slot.computed;
    const inputs = [...slot.ids.slice(first, first + row.count), ...row.drafts];
    const logits = row.logits ? new Float32Array(inputs.length * this.options.vocab).fill(-30) : new Float32Array(0);
    // Rejected drafts are written too, as a real forward pass does; the next step overwrites them.
    inputs.forEach((id, index) => {
      if (id < 0 || id >= this.options.vocab) refuse("ids", `${id} is outside the vocabulary`);
      this.#kv[this.#cell(slot, first + index)] = id;
      if (!row.logits) return;
      for (const [token, logit] of this.#logits(slot, first + index))
        logits[index * this.options.vocab + token] = logit;
    });
    slot.computed += row.count;
    const result: RowResult = { slot: row.slot, tokens: [], accepted: 0, computed: 0, details: [], logits };
    if (row.sample) this.#sample(slot, row, result);
    result.computed = slot.computed;
    return result;
  }

  #sample(slot: Slot, row: Row, result: RowResult): void {
    for (let index = 0; ; index++) {
      const { id, detail } = this.#choose(slot, row.logprobs);
      slot.ids.push(id);
      result.tokens.push(id);
      if (row.logprobs > 0 || row.margins) result.details.push(detail);
      if (row.drafts[index] !== id) return;
      slot.computed++;
      result.accepted++;
    }
  }

  // The model: candidates and logits are a hash of the last tokens up to `position`, read from the KV blocks.
  #logits(slot: Slot, position: number): Map<number, number> {
    let h = 0x1234567;
    for (let at = Math.max(0, position + 1 - this.options.window); at <= position; at++) {
      const id = this.#kv[this.#cell(slot, at)] ?? -1;
      if (id < 0) refuse("kv", `position ${at} was never written`);
      h = mix(h, id + 1);
    }
    const logits = new Map<number, number>();
    for (let index = 0; index < CANDIDATES; index++) {
      const draw = mix(h, index);
      logits.set(draw % this.options.vocab, unit(mix(draw, 77)) * 6);
    }
    for (const [id, logit] of this.options.boost ?? []) logits.set(id, (logits.get(id) ?? 0) + logit);
    return logits;
  }

  #choose(slot: Slot, logprobs: number): { id: number; detail: TokenDetail } {
    const raw = this.#logits(slot, slot.ids.length - 1);
    const { sampling } = slot;
    const counts = new Map<number, number>();
    for (const id of slot.ids.slice(slot.generatedFrom)) counts.set(id, (counts.get(id) ?? 0) + 1);
    const bias = new Map(sampling?.logitBias.map((entry) => [entry.id, entry.bias]));
    for (const id of bias.keys()) if (!raw.has(id)) raw.set(id, -30);
    const temperature = sampling?.temperature ?? 0;
    let best = { id: -1, score: Number.NEGATIVE_INFINITY };
    let second = Number.NEGATIVE_INFINITY;
    for (const [id, logit] of raw) {
      const count = counts.get(id) ?? 0;
      let score = logit + (bias.get(id) ?? 0);
      if (count > 0) score -= (sampling?.presencePenalty ?? 0) + count * (sampling?.frequencyPenalty ?? 0);
      if (temperature > 0)
        score = score / temperature - Math.log(-Math.log(unit(mix(mix(slot.seed, slot.ids.length), id))));
      if (score > best.score || (score === best.score && id < best.id)) {
        second = best.score;
        best = { id, score };
      } else second = Math.max(second, score);
    }
    const total = [...raw.values()].reduce((sum, logit) => sum + Math.exp(logit), 0);
    const of = (id: number) => (raw.get(id) ?? -30) - Math.log(total);
    const ranked = logprobs > 1 ? [...raw].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, logprobs - 1) : [];
    const top = ranked.map(([id]) => ({ id, logprob: of(id) }));
    return { id: best.id, detail: { logprob: of(best.id), top, scoreGap: best.score - second, routerGap: 1 } };
  }
}

function digestOf(rows: readonly Row[], results: readonly RowResult[]): bigint {
  let h = 0x9dc5;
  results.forEach((result, index) => {
    if (!rows[index]?.sample) return;
    for (const word of [result.slot, result.accepted, ...result.tokens]) h = mix(h, word);
  });
  return BigInt(h);
}
