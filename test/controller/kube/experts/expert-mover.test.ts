// Experts of serving groups: looked at, staged everywhere, then switched; nothing is lost by a failure, and a group that ends
// is let go.
import { beforeAll, expect, test } from "vitest";
import type { ExpertLinks } from "../../../../controller/kube/experts/expert-link.ts";
import {
  ExpertMover,
  type MovableGroup,
  type Moved,
  windowOf,
} from "../../../../controller/kube/experts/expert-mover.ts";
import { readModel } from "../../../../controller/model/model.ts";
import { parseInventory } from "../../../../controller/plan/hardware.ts";
import { planShards } from "../../../../controller/plan/plan.ts";
import { wishesOf } from "../../../../controller/plan/wishes.ts";
import type { ExpertLoadResponse } from "../../../../proto/gen/muster/v1/experts.ts";
import type { ExpertMap, ShardPlan } from "../../../../proto/gen/muster/v1/plan.ts";
import type { StageExpertsRequest } from "../../../../proto/gen/muster/v1/worker.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";

const LOOK_MS = 60_000;
const BLOCKS = [1, 3];
let plan: ShardPlan;
beforeAll(async () => {
  const model = await readModel(new URL("../../../models/nano-maverick/", import.meta.url).href, { headersOnly: true });
  const inventory = parseInventory("2xH200", 2);
  if (typeof inventory === "string") throw new Error(inventory);
  const planned = planShards(model, inventory, wishesOf({ pins: { tp: 2, ep: 2, workers: 2 } }));
  if (planned.kind !== "feasible") throw new Error("infeasible");
  plan = planned.plan;
});

/** Workers that count what they are told to have served, and remember what they were asked. */
class ScriptedWorkers implements ExpertLinks {
  readonly counts = BLOCKS.map(() => new Array<bigint>(8).fill(0n));
  map: ExpertMap | undefined;
  readonly staged: { worker: number; request: StageExpertsRequest }[] = [];
  readonly calls: string[] = [];
  /** Thrown by the next call of this name. */
  failing = new Map<string, Error>();

  serve(tokens: readonly number[]): void {
    for (const layer of this.counts)
      for (const [expert, count] of tokens.entries()) layer[expert] = (layer[expert] ?? 0n) + BigInt(count);
  }

  #call(name: string): void {
    this.calls.push(name);
    const error = this.failing.get(name);
    this.failing.delete(name);
    if (error !== undefined) throw error;
  }

  async expertLoad(): Promise<ExpertLoadResponse> {
    this.#call("load");
    return {
      layers: BLOCKS.map((block, index) => ({ block, tokens: [...(this.counts[index] ?? [])] })),
      map: this.map,
    };
  }

  async stageExperts({ name }: { name: { worker: number } }, request: StageExpertsRequest): Promise<void> {
    this.#call(`stage ${name.worker}`);
    this.staged.push({ worker: name.worker, request });
  }

  async switchExperts(_leader: unknown, version: number): Promise<{ numericsId: string }> {
    this.#call("switch");
    const all = this.staged.filter(({ request }) => request.map?.version === version);
    expect(new Set(all.map(({ worker }) => worker))).toEqual(new Set([0, 1]));
    this.map = all[0]?.request.map;
    return { numericsId: `n-${version}` };
  }
}

const groupOf = (incarnation = 1n): MovableGroup => ({
  incarnation,
  plan,
  targets: [0, 1].map((worker) => ({
    name: { group: "ns/chat-0", incarnation, worker },
    uid: `uid-${worker}`,
    address: `10.0.0.${worker}:7440`,
  })),
});

function bed() {
  const clock = new VirtualClock();
  const workers = new ScriptedWorkers();
  const moved: Moved[] = [];
  const seen: number[] = [];
  const failures: string[] = [];
  const mover = new ExpertMover({
    links: workers,
    clock,
    lookMs: LOOK_MS,
    stepMsOf: () => 20,
    onSeen: (_, { map }) => seen.push(map.version),
    onMoved: (_, what) => moved.push(what),
    onFailure: (_, detail) => failures.push(detail),
  });
  return { clock, workers, moved, seen, failures, mover };
}

const SKEWED = [40_000, 30_000, 20_000, 10_000, 1_000, 1_000, 1_000, 1_000];

test("the first look counts, the second moves: both workers stage before the leader switches", async () => {
  const { clock, workers, moved, failures, mover } = bed();
  workers.serve([9, 9, 9, 9, 9, 9, 9, 9]);
  mover.set("ns/chat-0", groupOf());
  await clock.runFor(1);
  workers.serve(SKEWED);
  await clock.runFor(LOOK_MS);
  expect(workers.calls).toEqual(["load", "load", "stage 0", "stage 1", "switch"]);
  expect(moved).toMatchObject([{ map: { version: 1 }, numericsId: "n-1" }]);
  expect(failures).toEqual([]);
  // Each gets planes of experts that its own rank comes to hold, and of no others.
  for (const { worker, request } of workers.staged) {
    expect(request.slices.length).toBeGreaterThan(0);
    expect(new Set(request.slices.map(({ rank }) => rank))).toEqual(new Set([worker]));
  }
  workers.serve(SKEWED);
  await clock.runFor(LOOK_MS);
  expect(workers.calls.slice(5)).toEqual(["load"]);
  await mover.close();
});

test("a worker that cannot stage: nobody switches, it is said, and tried again at a later look", async () => {
  const { clock, workers, moved, failures, mover } = bed();
  mover.set("ns/chat-0", groupOf());
  await clock.runFor(1);
  workers.serve(SKEWED);
  workers.failing.set("stage 1", new Error("file 3: is 10 bytes long"));
  await clock.runFor(LOOK_MS);
  expect(failures).toEqual(["experts stay where they are: file 3: is 10 bytes long"]);
  expect(workers.calls).not.toContain("switch");
  workers.serve(SKEWED);
  await clock.runFor(LOOK_MS);
  expect(moved).toHaveLength(1);
  await mover.close();
});

test("little load goes on counting over looks; another controller's map is where it goes on", async () => {
  const { clock, workers, moved, mover } = bed();
  const first = { version: 7, slots: 2, layers: BLOCKS.map((block) => ({ block, places: [0, 7, 2, 3, 4, 5, 6, 1] })) };
  workers.map = first;
  mover.set("ns/chat-0", groupOf());
  await clock.runFor(1);
  for (let look = 0; look < 4; look++) {
    workers.serve([1_500, 0, 0, 0, 0, 0, 0, 1_600]);
    await clock.runFor(LOOK_MS);
  }
  // 3,100 tokens a look: the fourth makes it more than 10,000.
  expect(workers.calls.slice(0, 5)).toEqual(["load", "load", "load", "load", "load"]);
  expect(moved.map(({ map }) => map.version)).toEqual([8]);
  await mover.close();
});

test("a new incarnation begins anew, a group that ends is asked no more", async () => {
  const { clock, workers, seen, mover } = bed();
  mover.set("ns/chat-0", groupOf(1n));
  await clock.runFor(LOOK_MS / 2);
  mover.set("ns/chat-0", groupOf(2n));
  await clock.runFor(LOOK_MS - 1);
  expect(workers.calls).toEqual(["load", "load"]);
  expect(seen).toEqual([0, 0]);
  await clock.runFor(2);
  expect(workers.calls).toEqual(["load", "load", "load"]);
  mover.set("ns/chat-0", undefined);
  await clock.runFor(LOOK_MS * 3);
  expect(workers.calls).toEqual(["load", "load", "load"]);
  expect(seen).toEqual([0, 0]);
  await mover.close();
});

test("counters that went back are those of another engine", () => {
  const answer = (tokens: bigint[]): ExpertLoadResponse => ({ layers: [{ block: 1, tokens }], map: undefined });
  expect(windowOf(undefined, answer([5n]))).toBeUndefined();
  expect(windowOf(answer([5n]), answer([4n]))).toBeUndefined();
  expect(windowOf(answer([5n]), answer([9n]))).toEqual([{ block: 1, tokens: [4n] }]);
});
