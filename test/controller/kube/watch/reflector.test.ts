import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  type KubeApi,
  KubeError,
  type KubeObject,
  keyOf,
  type WatchOptions,
} from "../../../../controller/kube/api/client.ts";
import { systemClock } from "../../../../controller/kube/api/clock.ts";
import { configMaps } from "../../../../controller/kube/api/resources.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { Reflector, type ReflectorOptions } from "../../../../controller/kube/watch/reflector.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { calm, type FaultPlan, FaultyApi } from "../../../sim/faults.ts";
import { SimHttpServer } from "../../../sim/http-server.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { until } from "../../../until.ts";
import { clientOf, mapOf, NS, resources, serve } from "../beds.ts";

const { signal } = new AbortController();

type Bed = { api?: (server: SimApiServer, time: VirtualClock) => KubeApi; more?: Partial<ReflectorOptions> };

function begin(options: Bed = {}) {
  const time = new VirtualClock();
  const server = new SimApiServer(time);
  const stop = new AbortController();
  const store = new Store({ labels: ["app"] });
  const metrics = new KubeMetrics();
  const reflector = new Reflector({
    api: options.api?.(server, time) ?? server,
    resource: configMaps,
    store,
    clock: time,
    random: () => 0.5,
    metrics,
    ...options.more,
  });
  const start = () => reflector.run(stop.signal);
  return { time, server, store, metrics, reflector, stop, start };
}

const contents = (objects: Iterable<KubeObject>) =>
  [...objects].map((object) => [keyOf(object), object.metadata.uid, object.metadata.resourceVersion]).sort();

/** One that answers watches as told and everything else as the server does. */
function withWatch(server: KubeApi, watch: (options: WatchOptions) => void): KubeApi {
  return overriding(server, "watch", (_, options) => ({
    // Ends at once, after what `watch` does.
    [Symbol.asyncIterator]: () => ({
      next: async () => {
        watch(options);
        return { done: true, value: undefined };
      },
    }),
  }));
}

function overriding<Name extends keyof KubeApi>(server: KubeApi, name: Name, by: KubeApi[Name]): KubeApi {
  return new Proxy(server, {
    get: (target, asked) => {
      if (asked === name) return by;
      const value: unknown = Reflect.get(target, asked);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
}

describe("one life", () => {
  test("it lists in pages, follows, and tells each change once", async () => {
    const { time, server, store, stop, start, metrics } = begin({ more: { limits: { pageSize: 3 } } });
    const told: string[] = [];
    store.subscribe((delta) => told.push(`${delta.kind} ${delta.object.metadata.name}`));
    for (let count = 0; count < 10; count += 1) await server.create(configMaps, mapOf(`c${count}`), signal);
    expect(store.isSynced).toBe(false);
    const running = start();
    await time.finish(store.synced(signal));
    expect(store.size).toBe(10);
    await server.delete(configMaps, "c3", NS, {}, signal);
    await server.patch(configMaps, "c4", NS, { data: { x: 1 } }, { type: "merge" }, signal);
    await time.runFor(3_600_000);
    expect(told.slice(10)).toEqual(["deleted c3", "updated c4"]);
    expect(metrics.total("muster_kube_lists_total")).toBe(1);
    // R2: an hour of watches that end in their time is no failure and no list.
    expect(metrics.total("muster_kube_watches_total")).toBeGreaterThan(7);
    expect(metrics.total("muster_kube_watch_failures_total")).toBe(0);
    stop.abort();
    await time.finish(running);
    expect(server.watchCount).toBe(0);
    expect(metrics.samples().filter(({ kind }) => kind === "gauge")).toEqual([]);
  });

  test("R4: a stream that falls silent is left for another; the lag says how long it has been", async () => {
    const plan = { ...calm, untilMs: Number.POSITIVE_INFINITY, watchStall: 1 };
    const { time, server, store, metrics, reflector, start } = begin({
      api: (server, time) => new FaultyApi(server, { time, random: () => 0.5, plan }),
    });
    void start();
    await time.finish(store.synced(signal));
    await server.create(configMaps, mapOf("late"), signal);
    await time.runFor(100_000);
    expect(store.size).toBe(0);
    expect(metrics.samples().find(({ name }) => name === "muster_kube_watch_lag_seconds")?.value).toBe(100);
    plan.watchStall = 0;
    await time.runFor(51_000);
    expect(metrics.total("muster_kube_watch_failures_total", { reason: "Idle" })).toBe(1);
    expect(store.size).toBe(1);
    expect(reflector.trouble).toBeUndefined();
  });

  test("R2: a server restored from a backup, behind the version it is asked for, is listed anew after a while", async () => {
    let restored: SimApiServer | undefined;
    const { time, server, store, metrics, start } = begin({
      api: (server) =>
        new Proxy(server, {
          get: (_, name) => {
            const target = restored ?? server;
            const value: unknown = Reflect.get(target, name);
            return typeof value === "function" ? value.bind(target) : value;
          },
        }),
    });
    for (let count = 0; count < 10; count += 1) await server.create(configMaps, mapOf(`c${count}`), signal);
    void start();
    await time.finish(store.synced(signal));
    restored = new SimApiServer(time);
    await restored.create(configMaps, mapOf("old"), signal);
    server.dropWatches();
    await time.runFor(900_000);
    expect(metrics.total("muster_kube_watch_failures_total", { reason: "Idle" })).toBe(3);
    expect(contents(store.all())).toEqual(contents(restored.objects(configMaps)));
  });

  test("R3: a server that refuses everything is asked ever more seldom, and not before it wishes", async () => {
    const askedMs: number[] = [];
    const { time, reflector, start } = begin({
      api: (server, time) =>
        overriding(server, "list", async () => {
          askedMs.push(time.nowMs());
          throw new KubeError(503, "ServiceUnavailable", "no", askedMs.length === 1 ? { retryAfterMs: 7_000 } : {});
        }),
    });
    void start();
    await time.runFor(600_000);
    const gaps = askedMs.slice(1).map((atMs, at) => atMs - (askedMs[at] ?? 0));
    expect(gaps[0]).toBeGreaterThanOrEqual(7_000);
    expect(Math.max(...gaps)).toBeLessThanOrEqual(30_000);
    expect(askedMs.length).toBeLessThan(45);
    expect(reflector.trouble?.reason).toBe("ServiceUnavailable");
  });

  test("watches that end at once are no hot loop", async () => {
    let count = 0;
    const { time, start } = begin({
      api: (server) =>
        withWatch(server, () => {
          count += 1;
        }),
    });
    void start();
    await time.runFor(60_000);
    expect(count).toBeGreaterThan(3);
    expect(count).toBeLessThan(20);
  });

  test("pages that are always too old are read in one piece", async () => {
    const limits: (number | undefined)[] = [];
    const { time, store, server, start } = begin({
      more: { limits: { pageSize: 1 } },
      api: (server) =>
        overriding(server, "list", async (...call) => {
          limits.push(call[1].limit);
          if (call[1].continue) throw new KubeError(410, "Expired", "too old");
          return server.list(...call);
        }),
    });
    await server.create(configMaps, mapOf("a"), signal);
    await server.create(configMaps, mapOf("b"), signal);
    void start();
    await time.finish(store.synced(signal));
    expect(store.size).toBe(2);
    expect(limits).toEqual([1, 1, 1, 1, undefined]);
  });

  test("a listener that throws is a broken invariant, not a fault to live with", async () => {
    const { time, server, store, start } = begin();
    store.subscribe(() => {
      throw new Error("broken");
    });
    await server.create(configMaps, mapOf("a"), signal);
    await expect(time.finish(start())).rejects.toThrow("broken");
  });
});

/** Each fault alone, hard, and all of them together. */
const FAULTS: Record<string, Partial<FaultPlan>> = {
  none: {},
  refusals: { refuse: 0.6 },
  unreachable: { unreachable: 0.6 },
  breaks: { watchBreak: 0.3 },
  gone: { watchGone: 0.3, pageGone: 0.5 },
  duplicates: { watchDuplicate: 0.5 },
  stalls: { watchStall: 0.2 },
  slow: { latencyMs: [0, 5_000], watchDelayMs: [0, 20_000] },
  all: {
    latencyMs: [0, 300],
    refuse: 0.2,
    unreachable: 0.2,
    pageGone: 0.2,
    watchBreak: 0.1,
    watchGone: 0.05,
    watchDuplicate: 0.1,
    watchStall: 0.05,
    watchDelayMs: [0, 500],
  },
};

type Step = { kind: "put" | "delete" | "replace" | "compact" | "drop" | "wait"; name: number; ms: number };

const steps = fc.array(
  fc.record({
    kind: fc.constantFrom<Step["kind"]>("put", "put", "put", "delete", "replace", "compact", "drop", "wait"),
    name: fc.integer({ min: 0, max: 7 }),
    ms: fc.integer({ min: 0, max: 30_000 }),
  }),
  { minLength: 20, maxLength: 60, size: "max" },
);

async function play(server: SimApiServer, { kind, name, ms }: Step): Promise<void> {
  const key = `c${name}`;
  const isThere = (await server.get(configMaps, key, NS, signal)) !== undefined;
  if (kind === "compact") server.compact();
  else if (kind === "drop") server.dropWatches();
  else if (kind === "delete" || kind === "replace") await server.delete(configMaps, key, NS, {}, signal);
  if (kind === "replace" || (kind === "put" && !isThere))
    await server.create(configMaps, mapOf(key, {}, { app: String(ms % 3) }), signal);
  else if (kind === "put")
    await server.patch(
      configMaps,
      key,
      NS,
      { metadata: { labels: { app: String(ms % 3) } } },
      { type: "merge" },
      signal,
    );
}

/** Keeps a second copy from the deltas alone: it must always be the store's. */
function mirror(store: Store, selector: string | undefined) {
  const copy = new Map<string, KubeObject>();
  store.subscribe((delta) => {
    const key = keyOf(delta.object);
    const known = copy.get(key);
    if (delta.kind === "added") expect(known).toBeUndefined();
    else expect(known?.metadata.uid).toBe(delta.object.metadata.uid);
    if (delta.kind === "updated") expect(delta.before).toBe(known);
    if (delta.kind === "deleted") copy.delete(key);
    else copy.set(key, delta.object);
    expect(store.get(key)).toBe(copy.get(key));
    if (selector === undefined && known !== undefined && delta.kind === "updated") {
      expect(Number(delta.object.metadata.resourceVersion)).toBeGreaterThan(Number(known.metadata.resourceVersion));
    }
  });
  return copy;
}

describe("R1: under every fault the store comes to be what the server has", () => {
  for (const [title, faults] of Object.entries(FAULTS)) {
    test(title, async () => {
      const happened = new Map<string, number>();
      await fc.assert(
        fc.asyncProperty(steps, fc.integer(), fc.boolean(), async (script, seed, isSelected) => {
          const time = new VirtualClock();
          const server = new SimApiServer(time);
          const random = randomOf(seed);
          const plan = { ...calm, ...faults, untilMs: Number.POSITIVE_INFINITY };
          const api = new FaultyApi(server, { time, random, plan });
          const store = new Store({ labels: ["app"] });
          const selection = isSelected ? { labelSelector: "app in (0,1)" } : {};
          const stop = new AbortController();
          const limits = { pageSize: 2 };
          const reflector = new Reflector({
            api,
            resource: configMaps,
            store,
            clock: time,
            random,
            limits,
            ...selection,
          });
          const running = reflector.run(stop.signal);
          const copy = mirror(store, selection.labelSelector);
          for (const step of script) {
            await play(server, step);
            await time.runFor(step.ms);
          }
          api.plan = { ...plan, untilMs: time.nowMs() };
          await time.runFor(600_000);
          const truth = await server.list(configMaps, selection, signal);
          expect(contents(store.all())).toEqual(contents(truth.items));
          expect(contents(copy.values())).toEqual(contents(truth.items));
          expect(contents(store.inNamespace(NS))).toEqual(contents(truth.items));
          const zeros = truth.items.filter(({ metadata }) => metadata.labels?.app === "0");
          expect(contents(store.labelled("app", "0"))).toEqual(contents(zeros));
          expect(reflector.trouble).toBeUndefined();
          for (const [fault, count] of api.happened) happened.set(fault, (happened.get(fault) ?? 0) + count);
          stop.abort();
          await time.finish(running);
        }),
        { numRuns: 150, seed: 20260101 },
      );
      for (const [fault, chance] of Object.entries(faults)) {
        if (typeof chance === "number") expect(happened.get(fault), `${fault} has happened`).toBeGreaterThan(0);
      }
    }, 120_000);
  }
});

describe("over real sockets", () => {
  test("a server that is killed and comes back with more is followed again, without a list where history suffices", async () => {
    const sim = new SimApiServer(realTime);
    const first = await serve(sim);
    const store = new Store();
    const metrics = new KubeMetrics();
    const stop = new AbortController();
    const reflector = new Reflector({
      api: clientOf(first.url),
      resource: configMaps,
      store,
      clock: systemClock,
      random: Math.random,
      metrics,
      limits: { backoff: { baseMs: 20, maxMs: 100 } },
    });
    const running = reflector.run(stop.signal);
    await sim.create(configMaps, mapOf("before"), signal);
    await until(() => store.size === 1, "the first object is seen");
    await first.close();
    await sim.create(configMaps, mapOf("during"), signal);
    await sim.delete(configMaps, "before", NS, {}, signal);
    await until(() => reflector.trouble !== undefined, "the loss is noticed");
    const second = await SimHttpServer.listen(sim, { resources, port: first.port });
    try {
      await until(() => store.get(`${NS}/during`) !== undefined && store.size === 1, "what happened meanwhile is seen");
      expect(metrics.total("muster_kube_lists_total")).toBe(1);
      await second.close();
      await sim.create(configMaps, mapOf("again"), signal);
      sim.compact();
      const third = await SimHttpServer.listen(sim, { resources, port: first.port });
      await until(() => store.size === 2, "it lists anew where history is gone");
      expect(metrics.total("muster_kube_lists_total")).toBe(2);
      stop.abort();
      await running;
      await third.close();
    } finally {
      stop.abort();
    }
  });

  test("50 reflectors keep a bounded number of sockets through a restart of all their watches", async () => {
    const sim = new SimApiServer(realTime);
    const server = await serve(sim);
    const api = clientOf(server.url, { limits: { rate: { perSecond: 1000, burst: 1000 } } });
    const stop = new AbortController();
    const stores = Array.from({ length: 50 }, () => new Store());
    const limits = { backoff: { baseMs: 20, maxMs: 100 } };
    const running = stores.map((store) =>
      new Reflector({ api, resource: configMaps, store, clock: systemClock, random: Math.random, limits }).run(
        stop.signal,
      ),
    );
    await until(() => sim.watchCount === 50, "50 watches are open");
    expect(server.socketsOpen).toBeLessThanOrEqual(128);
    sim.dropWatches();
    await sim.create(configMaps, mapOf("a"), signal);
    await until(() => stores.every((store) => store.size === 1), "all have seen it");
    await until(() => sim.watchCount === 50, "50 watches are open again");
    expect(server.socketsOpen).toBeLessThanOrEqual(128);
    stop.abort();
    await Promise.all(running);
  });
});
