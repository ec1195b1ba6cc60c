// Keys by when they are due. A binary heap; a key that was given another moment, or none, leaves its old entry behind, which
// is dropped when its turn comes.

type Entry = { atMs: number; key: string };

export class Deadlines {
  readonly #heap: Entry[] = [];
  readonly #atMs = new Map<string, number>();

  get size(): number {
    return this.#atMs.size;
  }

  has(key: string): boolean {
    return this.#atMs.has(key);
  }

  /** When the key is due; undefined where it is not here. */
  of(key: string): number | undefined {
    return this.#atMs.get(key);
  }

  set(key: string, atMs: number): void {
    this.#atMs.set(key, atMs);
    const heap = this.#heap;
    const entry = { atMs, key };
    let at = heap.push(entry) - 1;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      const above = heap[parent];
      if (above === undefined || above.atMs <= atMs) break;
      heap[at] = above;
      heap[parent] = entry;
      at = parent;
    }
  }

  delete(key: string): void {
    this.#atMs.delete(key);
  }

  clear(): void {
    this.#heap.length = 0;
    this.#atMs.clear();
  }

  /** When the first is due; Infinity where there is none. */
  nextMs(): number {
    for (let first = this.#heap[0]; first !== undefined; first = this.#heap[0]) {
      if (this.#atMs.get(first.key) === first.atMs) return first.atMs;
      this.#pop();
    }
    return Number.POSITIVE_INFINITY;
  }

  /** Takes the first that is due by then; undefined where none is. */
  take(nowMs: number): { key: string; atMs: number } | undefined {
    if (this.nextMs() > nowMs) return undefined;
    const first = this.#heap[0];
    this.#pop();
    if (first !== undefined) this.#atMs.delete(first.key);
    return first;
  }

  #pop(): void {
    const heap = this.#heap;
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return;
    let at = 0;
    for (;;) {
      const left = 2 * at + 1;
      const one = heap[left];
      const other = heap[left + 1];
      if (one === undefined) break;
      const [child, at2] = other !== undefined && other.atMs < one.atMs ? [other, left + 1] : [one, left];
      if (child.atMs >= last.atMs) break;
      heap[at] = child;
      at = at2;
    }
    heap[at] = last;
  }
}
