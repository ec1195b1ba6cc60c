// Block pool: which KV blocks are free, held, or resting. Owns counts, not bytes: the bytes live in native/.
// Does not own: who holds a block (sequences do), what is in it, when to preempt (worker/schedule).
//
//   K1  free + held + resting = total - 1, always. Block 0 belongs to padding and is never handed out.
//   K2  a block is handed out only when nobody holds it: its holders are counted, the last release gives it back.
//   K3  a block released while step e may still touch it rests until completed(e): a late writer never meets a new owner.
type Resting = { step: bigint; block: number };

export class BlockPool {
  readonly total: number;
  #free: number[] = [];
  #holders: Uint16Array;
  #resting: Resting[] = [];
  #completed = 0n;

  /** `total` counts block 0. */
  constructor(total: number) {
    if (!Number.isInteger(total) || total < 2) throw new Error(`block pool: total must be at least 2, not ${total}`);
    this.total = total;
    this.#holders = new Uint16Array(total);
    for (let block = total - 1; block >= 1; block--) this.#free.push(block);
  }

  get freeCount(): number {
    return this.#free.length;
  }

  get restingCount(): number {
    return this.#resting.length;
  }

  get heldCount(): number {
    return this.total - 1 - this.#free.length - this.#resting.length;
  }

  /** All or nothing: `count` blocks with one holder each, or undefined where fewer are free. */
  reserve(count: number): number[] | undefined {
    if (count > this.#free.length) return undefined;
    const blocks: number[] = [];
    for (let i = 0; i < count; i++) {
      const block = this.#free.pop();
      if (block === undefined) throw new Error("block pool: the free list is shorter than its length");
      this.#holders[block] = 1;
      blocks.push(block);
    }
    return blocks;
  }

  /** One more holder for each of these held blocks. */
  share(blocks: readonly number[]): void {
    for (const block of blocks) {
      const holders = this.#holders[block] ?? 0;
      if (holders === 0) throw new Error(`block pool: block ${block} is shared but nobody holds it`);
      if (holders === 0xffff) throw new Error(`block pool: block ${block} has too many holders`);
      this.#holders[block] = holders + 1;
    }
  }

  /** One holder less. `lastStep` is the last launched step that touches them (0n: none). */
  release(blocks: readonly number[], lastStep: bigint): void {
    for (const block of blocks) {
      const holders = this.#holders[block] ?? 0;
      if (holders === 0) throw new Error(`block pool: block ${block} is released but nobody holds it`);
      this.#holders[block] = holders - 1;
      if (holders > 1) continue;
      if (lastStep > this.#completed) this.#resting.push({ step: lastStep, block });
      else this.#free.push(block);
    }
  }

  /** Steps end in order: everything that rested for `step` or an earlier one is free again. */
  completed(step: bigint): void {
    if (step <= this.#completed) return;
    this.#completed = step;
    if (this.#resting.length === 0) return;
    const resting: Resting[] = [];
    for (const entry of this.#resting) {
      if (entry.step <= step) this.#free.push(entry.block);
      else resting.push(entry);
    }
    this.#resting = resting;
  }
}

/** Blocks that `tokens` positions need. */
export const blocksFor = (tokens: number, blockTokens: number): number => Math.ceil(tokens / blockTokens);
