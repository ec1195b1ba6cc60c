// A step and its result as flat 32-bit words: one typed array each way, whatever the number of sequences. The image of
// native/addon/decode.h, which draws the layout; a change is made in both and raises ABI.
//
//   W1  every number is checked to be what its words can hold; the error names the field.
import type { Row, SlotOpen, SlotUpdate, StepPlan } from "../../proto/gen/muster/v1/worker.ts";
import { greedy } from "../../proto/sampling.ts";
import { EngineError, type RowResult, type TokenDetail } from "./engine.ts";

/** Version of the word layouts and of the addon's calls. */
export const ABI = 2;

const MAGIC = 0x4d535431;
const KIND = { open: 1, close: 2, blocks: 3, truncate: 4, fork: 5, copy: 6, experts: 7 } as const;
const float = new Float32Array(1);
const floatBits = new Uint32Array(float.buffer);

class Writer {
  readonly words: number[] = [];
  at = "step";

  u32(field: string, value: number): void {
    if (!Number.isInteger(value) || value < 0 || value > 0xffffffff)
      throw refusal(`${this.at}.${field}`, `${value} is not a whole number of 32 bits`);
    this.words.push(value);
  }
  u64(field: string, value: bigint): void {
    if (BigInt.asUintN(64, value) !== value)
      throw refusal(`${this.at}.${field}`, `${value} is not a whole number of 64 bits`);
    this.words.push(Number(value & 0xffffffffn), Number(value >> 32n));
  }
  f32(value: number): void {
    float[0] = value;
    this.words.push(floatBits[0] ?? 0);
  }
  list(field: string, values: readonly number[]): void {
    this.words.push(values.length);
    for (const value of values) this.u32(field, value);
  }
}

const refusal = (field: string, detail: string): EngineError =>
  new EngineError({ code: "invalid", field, detail, rank: -1 });

/** Throws EngineError where a number does not fit its words. */
export function encodeStep(plan: StepPlan): Uint32Array {
  const out = new Writer();
  out.words.push(MAGIC);
  out.u64("step", plan.step);
  out.words.push(plan.updates.length, plan.rows.length);
  plan.updates.forEach((update, i) => {
    out.at = `updates[${i}]`;
    writeUpdate(out, update);
  });
  plan.rows.forEach((row, i) => {
    out.at = `rows[${i}]`;
    writeRow(out, row);
  });
  return Uint32Array.from(out.words);
}

function writeUpdate(out: Writer, update: SlotUpdate): void {
  const { kind } = update;
  if (kind === undefined) throw refusal(`${out.at}.kind`, "is not set");
  out.words.push(KIND[kind.$case]);
  out.u32("slot", update.slot);
  if (kind.$case === "open") writeOpen(out, kind.value);
  else if (kind.$case === "blocks") out.list("blocks", kind.value.blocks);
  else if (kind.$case === "truncate") out.u32("truncate.length", kind.value.length);
  else if (kind.$case === "fork") {
    out.u32("fork.from", kind.value.from);
    out.u32("fork.length", kind.value.length);
    out.list("fork.blocks", kind.value.blocks);
  } else if (kind.$case === "copy") {
    out.u32("copy.from", kind.value.from);
    out.u32("copy.to", kind.value.to);
  } else if (kind.$case === "experts") {
    out.u32("experts.version", kind.value.version);
  } else kind.$case satisfies "close";
}

function writeOpen(out: Writer, open: SlotOpen): void {
  const sampling = open.sampling ?? greedy;
  out.list("open.ids", open.ids);
  out.u32("open.generated_from", open.generatedFrom);
  out.u64("open.seed_low", open.seedLow);
  out.u64("open.seed_high", open.seedHigh);
  out.f32(sampling.temperature);
  out.u32("open.sampling.top_k", sampling.topK);
  out.f32(sampling.topP);
  out.f32(sampling.minP);
  out.f32(sampling.repetitionPenalty);
  out.f32(sampling.presencePenalty);
  out.f32(sampling.frequencyPenalty);
  out.words.push(sampling.logitBias.length);
  for (const { id, bias } of sampling.logitBias) {
    out.u32("open.sampling.bias.id", id);
    out.f32(bias);
  }
  out.u32("open.computed", open.computed);
  out.list("open.blocks", open.blocks);
}

function writeRow(out: Writer, row: Row): void {
  out.u32("slot", row.slot);
  out.u32("count", row.count);
  out.words.push((row.sample ? 1 : 0) | (row.logits ? 2 : 0) | (row.margins ? 4 : 0));
  out.u32("logprobs", row.logprobs);
  out.list("drafts", row.drafts);
}

export type EncodedResult = { words: Uint32Array; details: Float32Array; logits: Float32Array };

class Reader {
  readonly #from: EncodedResult;
  #word = 0;
  #detail = 0;
  #logit = 0;
  constructor(from: EncodedResult) {
    this.#from = from;
  }
  u32(): number {
    const value = this.#from.words[this.#word++];
    if (value === undefined) throw new Error("the engine's result ends early: addon and sources are of two versions");
    return value;
  }
  u64(): bigint {
    const low = this.u32();
    return BigInt(low) | (BigInt(this.u32()) << 32n);
  }
  list(): number[] {
    const length = this.u32();
    return Array.from({ length }, () => this.u32());
  }
  float(): number {
    return this.#from.details[this.#detail++] ?? Number.NaN;
  }
  logits(): Float32Array {
    const length = this.u32();
    return this.#from.logits.subarray(this.#logit, (this.#logit += length));
  }
}

/** Of a step that succeeded. */
export function decodeResult(encoded: EncodedResult): { step: bigint; digest: bigint; rows: RowResult[] } {
  const from = new Reader(encoded);
  const step = from.u64();
  const digest = from.u64();
  const length = from.u32();
  return { step, digest, rows: Array.from({ length }, () => readRow(from)) };
}

function readRow(from: Reader): RowResult {
  const slot = from.u32();
  const accepted = from.u32();
  const computed = from.u32();
  const tokens = from.list();
  const length = from.u32();
  const details = Array.from({ length }, () => readDetail(from));
  return { slot, tokens, accepted, computed, details, logits: from.logits() };
}

function readDetail(from: Reader): TokenDetail {
  const ids = from.list();
  const [logprob, scoreGap, routerGap] = [from.float(), from.float(), from.float()];
  return { logprob, scoreGap, routerGap, top: ids.map((id) => ({ id, logprob: from.float() })) };
}
