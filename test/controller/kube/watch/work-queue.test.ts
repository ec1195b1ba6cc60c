import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { Deadlines } from "../../../../controller/kube/api/deadlines.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { type QueueLimits, WorkQueue } from "../../../../controller/kube/watch/work-queue.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";

const { signal } = new AbortController();
const patient: Partial<QueueLimits> = {
  backoff: { baseMs: 100, maxMs: 1_000 },
  retries: { perSecond: 1e6, burst: 1e6 },
};

function begin(limits: Partial<QueueLimits> = {}, onRelief: () => void = () => {}) {
  const time = new VirtualClock();
  const metrics = new KubeMetrics();
  const queue = new WorkQueue({
    name: "q",
    clock: time,
    random: () => 1,
    limits: { ...patient, ...limits },
    metrics,
    onRelief,
  });
  const startMs = time.nowMs();
  return { time, queue, metrics, nowMs: () => time.nowMs() - startMs, startMs };
}

describe("work queue", () => {
  test("Q1, Q2: adds before a turn are one turn, adds during it are one more after it", async () => {
    const { time, queue, nowMs } = begin();
    const turns: string[] = [];
    let running = 0;
    const ended = queue.work(
      async (key) => {
        running += 1;
        expect(running).toBe(1);
        turns.push(`${key}@${nowMs()}`);
        await time.sleep(signal, time.nowMs() + 10);
        running -= 1;
        return undefined;
      },
      { concurrency: 5 },
      signal,
    );
    queue.add("a");
    queue.add("a");
    await time.runFor(5);
    queue.add("a");
    queue.add("a");
    await time.runFor(100);
    expect(turns).toEqual(["a@0", "a@10"]);
    expect(queue.size).toBe(0);
    queue.close();
    await time.finish(ended);
  });

  test("Q3: back-off doubles up to its bound, is not cut short by adds during the turn, but by one after it, and is forgotten", async () => {
    const { time, queue, nowMs, metrics } = begin();
    const turns: number[] = [];
    let isFailing = true;
    void queue.work(
      async (key) => {
        turns.push(nowMs());
        if (isFailing && turns.length <= 2) queue.add(key);
        if (isFailing) throw new Error("no");
        return undefined;
      },
      { concurrency: 1 },
      signal,
    );
    queue.add("a");
    await time.runFor(4_000);
    expect(turns).toEqual([0, 100, 300, 700, 1_500, 2_500, 3_500]);
    queue.add("a");
    await time.runFor(0);
    expect(turns.at(-1)).toBe(4_000);
    isFailing = false;
    queue.add("a");
    await time.runFor(0);
    isFailing = true;
    queue.add("a");
    await time.runFor(150);
    expect(turns.slice(-2)).toEqual([4_000, 4_100]);
    expect(metrics.total("muster_queue_retries_total")).toBe(10);
  });

  test("retries of all keys together have a rate", async () => {
    const { time, queue, nowMs } = begin({ retries: { perSecond: 2, burst: 3 }, backoff: { baseMs: 1, maxMs: 1 } });
    const again: number[] = [];
    const seen = new Set<string>();
    void queue.work(
      async (key) => {
        if (seen.has(key)) again.push(nowMs());
        if (seen.has(key)) return undefined;
        seen.add(key);
        throw new Error("all of them");
      },
      { concurrency: 10 },
      signal,
    );
    for (let count = 0; count < 9; count += 1) queue.add(`k${count}`);
    await time.runFor(10_000);
    expect(again).toEqual([1, 1, 1, 500, 1_000, 1_500, 2_000, 2_500, 3_000]);
  });

  test("Q4: beyond its bound it refuses, and asks for everything anew when there is room", async () => {
    const wanted = Array.from({ length: 10 }, (_, at) => `k${at}`);
    const served = new Set<string>();
    let reliefs = 0;
    const { time, queue, metrics } = begin({ keysMax: 4 }, () => {
      reliefs += 1;
      for (const key of wanted) if (!served.has(key)) queue.add(key);
    });
    expect(wanted.map((key) => queue.add(key))).toEqual([true, true, true, true, ...Array(6).fill(false)]);
    expect(queue.add("k0")).toBe(true);
    void queue.work(
      async (key) => {
        served.add(key);
        return undefined;
      },
      { concurrency: 1 },
      signal,
    );
    await time.runFor(1_000);
    expect([...served].sort()).toEqual(wanted);
    expect(reliefs).toBeGreaterThan(0);
    expect(metrics.total("muster_queue_overflows_total")).toBeGreaterThan(0);
  });

  test("a handler's wish for another look is kept; closing waits for the running turns and starts none", async () => {
    const { time, queue, nowMs } = begin();
    const turns: string[] = [];
    const stop = new AbortController();
    let isEnded = false;
    const ended = queue
      .work(
        async (key, given) => {
          turns.push(`${key}@${nowMs()}`);
          if (key === "slow") await time.sleep(signal, time.nowMs() + 500);
          expect(given).toBe(stop.signal);
          return { againMs: time.nowMs() + 1_000 };
        },
        { concurrency: 1 },
        stop.signal,
      )
      .then(() => {
        isEnded = true;
      });
    queue.add("a");
    await time.runFor(2_500);
    expect(turns).toEqual(["a@0", "a@1000", "a@2000"]);
    queue.add("slow");
    queue.add("b");
    await time.runFor(1);
    stop.abort();
    await time.runFor(100);
    expect(isEnded).toBe(false);
    await time.finish(ended);
    expect(turns.at(-1)).toBe("slow@2500");
    expect(queue.add("c")).toBe(false);
  });
});

type Op = { kind: "add" | "delay" | "pass"; key: string; ms: number };
const ops = fc.array(
  fc.record({
    kind: fc.constantFrom<Op["kind"]>("add", "delay", "pass"),
    key: fc.constantFrom("a", "b", "c"),
    ms: fc.integer({ min: 1, max: 300 }),
  }),
  { minLength: 1, maxLength: 60 },
);

test("model: each key has its turn as soon as its earliest wish says and its last turn has ended, and none without a wish", async () => {
  await fc.assert(
    fc.asyncProperty(ops, fc.integer({ min: 0, max: 50 }), async (script, turnMs) => {
      const { time, queue, nowMs, startMs } = begin();
      const turns: { key: string; atMs: number; endMs: number }[] = [];
      void queue.work(
        async (key) => {
          const turn = { key, atMs: nowMs(), endMs: Number.POSITIVE_INFINITY };
          turns.push(turn);
          await time.sleep(signal, time.nowMs() + turnMs);
          turn.endMs = nowMs();
          return undefined;
        },
        { concurrency: 3 },
        signal,
      );
      // The model: for each key when it is free again, and its earliest wish.
      const model = new Map<string, { freeMs: number; wishMs: number }>();
      const expected: string[] = [];
      const settle = (untilMs: number) => {
        for (const [key, state] of model) {
          const atMs = Math.max(state.wishMs, state.freeMs);
          if (atMs > untilMs || state.wishMs === Number.POSITIVE_INFINITY) continue;
          expected.push(`${key}@${atMs}`);
          state.freeMs = atMs + turnMs;
          state.wishMs = Number.POSITIVE_INFINITY;
        }
      };
      let now = 0;
      for (const op of script) {
        if (op.kind === "pass") {
          await time.runFor(op.ms);
          now += op.ms;
        } else {
          const wishMs = op.kind === "add" ? now : now + op.ms;
          if (op.kind === "add") queue.add(op.key);
          else queue.addAt(op.key, startMs + wishMs);
          const state = model.get(op.key) ?? { freeMs: 0, wishMs: Number.POSITIVE_INFINITY };
          model.set(op.key, { ...state, wishMs: Math.min(state.wishMs, wishMs) });
          // Lets what is due at this moment have its turn, as the model does.
          await time.runFor(0);
        }
        settle(now);
      }
      await time.runFor(10_000);
      settle(now + 10_000);
      expect(turns.map(({ key, atMs }) => `${key}@${atMs}`).sort()).toEqual(expected.sort());
      for (const key of ["a", "b", "c"]) {
        const own = turns.filter((turn) => turn.key === key);
        own.slice(1).forEach((turn, at) => {
          expect(turn.atMs).toBeGreaterThanOrEqual(own[at]?.endMs ?? Number.POSITIVE_INFINITY);
        });
      }
    }),
    { numRuns: 300, seed: 7 },
  );
});

test("deadlines: keys come out in the order of their last moment, as from a sorted list", () => {
  fc.assert(
    fc.property(
      fc.array(fc.tuple(fc.constantFrom(..."abcdefgh"), fc.option(fc.integer({ min: 0, max: 50 })))),
      fc.integer({ min: 0, max: 60 }),
      (sets, nowMs) => {
        const heap = new Deadlines();
        const model = new Map<string, number>();
        for (const [key, atMs] of sets) {
          if (atMs === null) {
            heap.delete(key);
            model.delete(key);
          } else {
            heap.set(key, atMs);
            model.set(key, atMs);
          }
        }
        expect(heap.size).toBe(model.size);
        expect(heap.nextMs()).toBe(Math.min(...model.values()));
        const due = [...model.values()].filter((atMs) => atMs <= nowMs).sort((one, other) => one - other);
        const taken: number[] = [];
        for (let next = heap.take(nowMs); next !== undefined; next = heap.take(nowMs)) {
          expect(model.get(next.key)).toBe(next.atMs);
          taken.push(next.atMs);
        }
        expect(taken).toEqual(due);
      },
    ),
    { seed: 1 },
  );
});
