// Writes StepPlans. Owns slots, block tables and step numbers of the group: what a plan says is what every rank holds.
//
//   W1  a slot is closed in the plan stream before it is opened again.
//   W2  blocks that a launched step may touch come back only when it is done (block-pool.ts, K3).
//   W3  step numbers are 1, 2, 3, ... without a gap.
import { FaultError, waiting } from "../../proto/fault.ts";
import type { Row, SlotOpen, SlotUpdate, StepPlan } from "../../proto/gen/muster/v1/worker.ts";
import { BlockPool } from "../kv/block-pool.ts";

/** Whoever holds a slot and blocks; slot 0 is none. */
export type Holder = { slot: number; blocks: number[]; lastStep: bigint };

export class StepWriter {
  readonly #pool: BlockPool;
  readonly #incarnation: bigint;
  readonly #freeSlots: number[] = [];
  #updates: SlotUpdate[] = [];
  #rows: Row[] = [];
  #touched: Holder[] = [];
  #step = 0n;
  /** Asked for and not done: in the next plan, or in a step that is in flight. */
  #switch: ({ version: number; step: bigint } & PromiseWithResolvers<void>) | undefined;

  constructor(options: { kvBlocks: number; slotsMax: number; incarnation: bigint }) {
    this.#pool = new BlockPool(options.kvBlocks);
    this.#incarnation = options.incarnation;
    for (let slot = options.slotsMax - 1; slot >= 1; slot--) this.#freeSlots.push(slot);
  }

  get step(): bigint {
    return this.#step;
  }
  get blocksFree(): number {
    return this.#pool.freeCount;
  }
  get blocksTotal(): number {
    return this.#pool.total - 1;
  }
  get slotsFree(): number {
    return this.#freeSlots.length;
  }

  /** Gives the holder `count` more blocks; false, and nothing changed, where they are not free. */
  reserve(holder: Holder, count: number): boolean {
    const blocks = this.#pool.reserve(count);
    if (blocks === undefined) return false;
    holder.blocks.push(...blocks);
    return true;
  }

  /** Opens a slot with the holder's blocks. */
  open(holder: Holder, what: Omit<SlotOpen, "blocks" | "computed">): void {
    const slot = this.#freeSlots.pop();
    if (slot === undefined) throw new Error("step writer: no slot is free; the scheduler was told otherwise");
    holder.slot = slot;
    const value: SlotOpen = { ...what, computed: 0, blocks: [...holder.blocks] };
    this.#updates.push({ slot, kind: { $case: "open", value } });
  }

  /** Appends blocks to the table of an open slot. */
  grow(holder: Holder, count: number): void {
    if (count === 0) return;
    if (!this.reserve(holder, count))
      throw new Error("step writer: blocks are short; the scheduler was told otherwise");
    const blocks = holder.blocks.slice(-count);
    this.#updates.push({ slot: holder.slot, kind: { $case: "blocks", value: { blocks } } });
  }

  row(holder: Holder, row: Omit<Row, "slot">): void {
    this.#rows.push({ ...row, slot: holder.slot });
    this.#touched.push(holder);
  }

  /**
   * The next plan switches to the map of experts that all ranks have staged; resolves when its step is done. Rejects with
   * FaultError, also where another switch is on its way.
   */
  switchExperts(version: number): Promise<void> {
    if (this.#switch !== undefined)
      return Promise.reject(new FaultError(waiting("switching", "another map of experts is being switched to")));
    this.#switch = { version, step: 0n, ...Promise.withResolvers<void>() };
    this.#updates.push({ slot: 0, kind: { $case: "experts", value: { version } } });
    return this.#switch.promise;
  }

  /** State is gone: nothing that was asked for comes. */
  fail(error: FaultError): void {
    this.#switch?.reject(error);
    this.#switch = undefined;
  }

  /** A plan without rows has something to say that does not wait. */
  get isDue(): boolean {
    return this.#switch?.step === 0n;
  }

  /** Takes slot and blocks away; also where only one of them is held, or none. */
  release(holder: Holder): void {
    if (holder.slot !== 0) {
      this.#updates.push({ slot: holder.slot, kind: { $case: "close", value: {} } });
      this.#freeSlots.push(holder.slot);
      holder.slot = 0;
    }
    this.#pool.release(holder.blocks, holder.lastStep);
    holder.blocks = [];
  }

  /** The plan of everything written since the last one. */
  take(): StepPlan {
    const step = ++this.#step;
    if (this.#switch?.step === 0n) this.#switch.step = step;
    for (const holder of this.#touched) holder.lastStep = step;
    const plan: StepPlan = { step, updates: this.#updates, rows: this.#rows, incarnation: this.#incarnation };
    this.#updates = [];
    this.#rows = [];
    this.#touched = [];
    return plan;
  }

  completed(step: bigint): void {
    this.#pool.completed(step);
    if (this.#switch?.step !== step) return;
    this.#switch.resolve();
    this.#switch = undefined;
  }
}
