import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { backoffMs, TokenBucket, waitForToken } from "../../../../controller/kube/api/rate-limit.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";

describe("token bucket", () => {
  test("T1: no span lets through more than the burst and its share, however it is asked", () => {
    const gaps = fc.array(fc.tuple(fc.integer({ min: -50, max: 2_000 }), fc.boolean()), { maxLength: 200 });
    fc.assert(
      fc.property(gaps, fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 20 }), (asks, burst, perSecond) => {
        const bucket = new TokenBucket({ burst, perSecond }, 0);
        let nowMs = 0;
        const grantedMs: number[] = [];
        for (const [gapMs, isReserved] of asks) {
          nowMs += gapMs;
          if (isReserved) grantedMs.push(bucket.reserve(nowMs) ?? Number.NaN);
          else if (bucket.take(nowMs)) grantedMs.push(nowMs);
        }
        const sorted = grantedMs.sort((one, other) => one - other);
        sorted.forEach((fromMs, from) => {
          sorted.slice(from).forEach((toMs, count) => {
            expect(count + 1).toBeLessThanOrEqual(burst + ((toMs - fromMs + 50) / 1000) * perSecond + 1 + 1e-6);
          });
        });
      }),
      { seed: 3 },
    );
  });

  test("T2: waiting is in the order of asking and bounded; who is refused has taken nothing", async () => {
    const time = new VirtualClock(0);
    const bucket = new TokenBucket({ burst: 1, perSecond: 1 }, 0);
    const { signal } = new AbortController();
    const order: string[] = [];
    const ask = (name: string, waitMsMax: number) =>
      waitForToken(bucket, time, signal, waitMsMax).then((isGranted) =>
        order.push(`${name} ${isGranted} ${time.nowMs()}`),
      );
    const asked = [ask("a", 0), ask("b", 5_000), ask("late", 500), ask("c", 5_000)];
    await time.finish(Promise.all(asked));
    expect(order.sort()).toEqual(["a true 0", "b true 1000", "c true 2000", "late false 0"]);
  });

  test("back-off doubles from base to bound and keeps at least half of it", () => {
    const bounds = { baseMs: 100, maxMs: 1_000 };
    expect([1, 2, 3, 4, 5, 99].map((failures) => backoffMs(failures, bounds, () => 1))).toEqual([
      100, 200, 400, 800, 1000, 1000,
    ]);
    expect(backoffMs(2, bounds, () => 0)).toBe(100);
  });
});
