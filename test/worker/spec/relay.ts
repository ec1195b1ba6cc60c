// A relay between the target's bus and the draft's: every frame passes through it, and it loses, repeats, delays and garbles
// them by a seeded plan. Faults live here, outside of the product.
import type { Bus } from "../../../worker/spec/bus.ts";

export type Faults = {
  /** Share of frames lost, 0..1. */
  loss: number;
  /** Share of frames sent twice. */
  duplicate: number;
  /** Longest delay, milliseconds; each copy draws its own, so frames overtake each other. */
  delayMsMax: number;
  /** Share of frames with flipped bytes. */
  garble: number;
};

export const noFaults: Faults = { loss: 0, duplicate: 0, delayMsMax: 0, garble: 0 };

/** A small seeded generator (mulberry32), uniform in [0, 1). */
export function randomFrom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
}

/** Carries COMMIT frames from target to draft, hints and hellos back. Returns how to end it, and counters. */
export function relay(target: Bus, draft: Bus, options: { faults: Faults; seed: number }) {
  const random = randomFrom(options.seed);
  const counts = { seen: 0, lost: 0, repeated: 0, garbled: 0 };
  const timers = new Set<NodeJS.Timeout>();
  const pass = (to: Bus) => (data: Uint8Array, subject: string) => {
    const { faults } = options;
    counts.seen++;
    if (random() < faults.loss) return void counts.lost++;
    const copies = random() < faults.duplicate ? 2 : 1;
    counts.repeated += copies - 1;
    for (let i = 0; i < copies; i++) {
      const copy = Uint8Array.from(data);
      if (random() < faults.garble) {
        counts.garbled++;
        for (let flips = 0; flips < 4; flips++) copy[Math.floor(random() * copy.length)] = Math.floor(random() * 256);
      }
      const delay = random() * faults.delayMsMax;
      if (delay < 1) to.publish(subject, copy);
      else {
        const timer = setTimeout(() => {
          timers.delete(timer);
          to.publish(subject, copy);
        }, delay);
        timers.add(timer);
      }
    }
  };
  const ends = [
    target.subscribe("spec.v1.d.*.c", pass(draft)),
    draft.subscribe("spec.v1.t.*.p", pass(target)),
    draft.subscribe("spec.v1.pool.*.hello", pass(target)),
  ];
  return {
    counts,
    stop() {
      for (const end of ends) end();
      for (const timer of timers) clearTimeout(timer);
    },
  };
}
