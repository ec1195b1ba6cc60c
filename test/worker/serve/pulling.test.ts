// A worker that brings its files itself: what it says meanwhile, what it opens then, and how it ends where it cannot.
import { expect, test } from "vitest";
import { FaultError, invalid, transient } from "../../../proto/fault.ts";
import { Fault_Kind, type LoadProgress, WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";
import type { Localise } from "../../../worker/serve/role.ts";
import { folder, load, loadRequest, same, start } from "./worker-bed.ts";

const startPulling = (localise: Localise) => start(folder(), 0, same, { localise });

test("PULLING with bytes comes before LOADING, and what is served is the localised plan", async () => {
  const told: [number, number][] = [];
  const worker = await startPulling(async (plan, { onProgress }) => {
    const steps: [number, number][] = [
      [0, 100],
      [60, 100],
      [100, 100],
    ];
    for (const [bytes, total] of steps) {
      onProgress(bytes, total);
      told.push([bytes, total]);
    }
    return { ...plan, revision: "local" };
  });
  const seen: LoadProgress[] = [];
  const phases: WorkerPhase[] = [];
  for await (const progress of worker.client.load(loadRequest(0, [worker.address]))) {
    seen.push(progress);
    if (phases.at(-1) !== progress.phase) phases.push(progress.phase);
  }
  expect(phases.indexOf(WorkerPhase.PULLING)).toBeGreaterThanOrEqual(0);
  expect(phases.indexOf(WorkerPhase.PULLING)).toBeLessThan(phases.lastIndexOf(WorkerPhase.SERVING));
  expect(phases.at(-1)).toBe(WorkerPhase.SERVING);
  expect(told).toHaveLength(3);
  // Bytes of one phase are not those of the next.
  const loading = seen.filter(({ phase }) => phase === WorkerPhase.LOADING);
  expect(loading.every(({ bytesTotal }) => bytesTotal !== 100n)).toBe(true);
});

test("bytes are seen while they come", async () => {
  const go = Promise.withResolvers<void>();
  const worker = await startPulling(async (plan, { onProgress }) => {
    onProgress(60, 100);
    await go.promise;
    return plan;
  });
  for await (const { phase, bytesLoaded, bytesTotal } of worker.client.load(loadRequest(0, [worker.address]))) {
    if (phase !== WorkerPhase.PULLING) continue;
    const described = await new Promise((done) =>
      worker.client.describe({ incarnation: 7n }, (_, found) => done(found)),
    );
    expect(described).toMatchObject({ phase: WorkerPhase.PULLING, bytesLoaded: 60n, bytesTotal: 100n });
    expect([0n, 60n]).toContain(bytesLoaded);
    expect([0n, 100n]).toContain(bytesTotal);
    go.resolve();
  }
});

test.each([
  [invalid("model.safetensors", "has 1 byte, the plan was made for 2", "model_changed"), Fault_Kind.INVALID],
  [transient("source_unreachable", "broke off"), Fault_Kind.TRANSIENT],
])("a fault of the source is the Load's", async (fault, kind) => {
  const worker = await startPulling(async () => {
    throw new FaultError(fault);
  });
  const last = (await load(worker, loadRequest(0, [worker.address]))).at(-1);
  expect(last).toMatchObject({ phase: WorkerPhase.FAILED, fault: { kind, detail: fault.detail } });
  expect(worker.engine).toBeUndefined();
});

test("a worker that ends while it pulls cancels it", async () => {
  const aborted = Promise.withResolvers<void>();
  const begun = Promise.withResolvers<void>();
  const worker = await startPulling((_, { signal }) => {
    begun.resolve();
    return new Promise((_done, fail) => {
      signal.addEventListener("abort", () => {
        aborted.resolve();
        fail(new FaultError(transient("cancelled", "reading the model was cancelled")));
      });
    });
  });
  load(worker, loadRequest(0, [worker.address])).catch(() => {});
  await begun.promise;
  worker.stop.abort();
  await aborted.promise;
  await worker.ended;
  expect(worker.engine).toBeUndefined();
});
