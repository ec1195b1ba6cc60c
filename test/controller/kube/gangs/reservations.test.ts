// The reservation ledger: its rules one by one, and its size. Random histories are in gang-histories.test.ts.
import { describe, expect, test } from "vitest";
import type { GangPod, Seat } from "../../../../controller/kube/gangs/gang-pods.ts";
import {
  type GangDecision,
  type GangStep,
  type GangWish,
  gangLimits,
  type Ledger,
  rebuild,
  step,
} from "../../../../controller/kube/gangs/reservations.ts";
import type { Within } from "../../../../controller/kube/gangs/rooms.ts";
import type { GpuNode } from "../../../../controller/kube/inventory/inventory.ts";
import { deviceOf } from "../../../../controller/plan/hardware.ts";

const NOW = 1_000_000;
const T = gangLimits.wholeMs;

function gpuNode(name: string, changes: Partial<GpuNode> = {}): GpuNode {
  const device = deviceOf("H200");
  if (device === undefined) throw new Error("no H200");
  const allocatable = changes.allocatable ?? 8;
  const held = changes.held ?? 0;
  const base = {
    name,
    device,
    allocatable,
    held,
    free: allocatable - held,
    domain: name,
    zone: undefined,
    labels: {},
    taints: [],
  };
  return { ...base, closed: undefined, ...changes };
}

function wish(group: string, devices: number[], changes: Partial<GangWish> = {}): GangWish {
  const base = { incarnation: 1n, priority: 0, sinceMs: NOW, selection: {}, within: "any", failedOn: {} } as const;
  return { group, devices, ...base, ...changes };
}

function podsOf(
  { group, incarnation, devices }: GangWish,
  change: (pod: GangPod) => Partial<GangPod> = () => ({}),
): GangPod[] {
  return devices.map((count, worker): GangPod => {
    const name = `${group}-${incarnation}-${worker}`;
    const place = { state: "waiting", node: "", isLeaving: false, foreignGates: [], written: undefined } as const;
    const pod: GangPod = { name, namespace: "models", group, incarnation, worker, devices: count, ...place };
    return { ...pod, ...change(pod) };
  });
}

type Scene = { nodes: GpuNode[]; wishes: GangWish[]; pods?: GangPod[]; nowMs?: number; memory?: Ledger };

function run({ nodes, wishes, pods, nowMs = NOW, memory = new Map() }: Scene): GangStep {
  return step(memory, { nowMs, nodes, wishes, pods: pods ?? wishes.flatMap((each) => podsOf(each)) });
}

/** `a: n1 n2`, `b: capacity-short`, in the order of decisions. */
function short(decisions: readonly GangDecision[]): string[] {
  return decisions.map((each) => {
    if (each.kind === "reserve") return `${each.group}: ${each.seats.map(({ node }) => node).join(" ")}`;
    return `${each.group}: ${each.kind === "release" ? `release ${each.code}` : each.code}`;
  });
}
const answer = (scene: Scene): string[] => short(run(scene).decisions);
const text = (scene: Scene): string => {
  const [first] = run(scene).decisions;
  return first?.kind === "reserve" ? "" : (first?.text ?? "");
};

const four = ["n1", "n2", "n3", "n4"].map((name) => gpuNode(name));

describe("all or nothing", () => {
  test("a gang gets a node for each pod, or waits and says for what", () => {
    expect(answer({ nodes: four, wishes: [wish("a", [8, 8])] })).toEqual(["a: n1 n2"]);
    const nodes = [
      gpuNode("n1"),
      gpuNode("n2", { held: 2, free: 6 }),
      gpuNode("n3", { closed: { code: "cordoned", text: "it is cordoned" } }),
    ];
    expect(answer({ nodes, wishes: [wish("a", [8, 8])] })).toEqual(["a: capacity-short"]);
    expect(text({ nodes, wishes: [wish("a", [8, 8])] })).toBe(
      "2 nodes with 8 free GPUs each are needed: there is too little free (n1: 8 free; n2: 6 free; n3: it is cordoned)",
    );
    expect(text({ nodes: [], wishes: [wish("a", [4])] })).toBe(
      "1 node with 4 free GPUs is needed: no set of nodes could hold it (no node has a free GPU)",
    );
  });

  test("pods of one gang never share a node, even where there is room", () => {
    expect(answer({ nodes: [gpuNode("n1")], wishes: [wish("a", [4, 4])] })).toEqual(["a: never-fits"]);
  });

  test("what is reserved is not reserved again before it is seen on pods", () => {
    const wishes = [wish("a", [8, 8]), wish("b", [8, 8]), wish("c", [8, 8])];
    const first = run({ nodes: four, wishes });
    expect(short(first.decisions)).toEqual(["a: n1 n2", "b: n3 n4", "c: capacity-short"]);
    const again = run({ nodes: four, wishes, memory: first.ledger });
    expect(short(again.decisions)).toEqual(["a: binding", "b: binding", "c: capacity-short"]);
    expect(again.ledger).toEqual(first.ledger);
    expect(first.wakeMs).toBe(NOW + T);
  });

  test("small gangs fill used nodes and leave whole ones whole", () => {
    const nodes = [gpuNode("n1"), gpuNode("n2", { held: 4, free: 4 }), gpuNode("n3", { held: 6, free: 2 })];
    expect(answer({ nodes, wishes: [wish("a", [2]), wish("b", [3])] })).toEqual(["a: n3", "b: n2"]);
  });
});

describe("who comes first", () => {
  const two = four.slice(0, 2);

  test("priority, then age, then name", () => {
    const wishes = [
      wish("c", [8]),
      wish("b", [8]),
      wish("old", [8], { sinceMs: NOW - 1 }),
      wish("high", [8], { priority: 1 }),
    ];
    expect(answer({ nodes: two, wishes })).toEqual(["high: n1", "old: n2", "b: capacity-short", "c: capacity-short"]);
  });

  test("a gang that lacks rooms keeps what is free of them, until keepMs after it was wished for", () => {
    const nodes = [gpuNode("n1", { held: 4, free: 4 }), gpuNode("n2", { held: 8, free: 0 })];
    const wishes = [wish("large", [8, 8], { sinceMs: NOW - 5 }), wish("small", [4])];
    expect(answer({ nodes, wishes })).toEqual(["large: capacity-short", "small: behind"]);
    expect(run({ nodes, wishes }).wakeMs).toBe(NOW - 5 + gangLimits.keepMs);
    const late = NOW - 5 + gangLimits.keepMs;
    expect(answer({ nodes, wishes, nowMs: late })).toEqual(["large: capacity-short", "small: n1"]);
  });

  test("back-fill: rooms that the waiting gang cannot use or does not need are free for others", () => {
    const nodes = [
      gpuNode("n1", { held: 4, free: 4 }),
      gpuNode("n2"),
      gpuNode("n3", { held: 7, free: 1, labels: { pool: "b" } }),
    ];
    const large = wish("large", [8, 8], { sinceMs: NOW - 5 });
    expect(answer({ nodes, wishes: [large, wish("small", [1])] })).toEqual(["large: capacity-short", "small: n3"]);
    const pinned = wish("pinned", [8, 8], { sinceMs: NOW - 5, selection: { nodeSelector: { pool: "b" } } });
    expect(answer({ nodes, wishes: [pinned, wish("small", [8])] })).toEqual(["pinned: never-fits", "small: n2"]);
  });

  test("one that no set of nodes could ever hold keeps nothing", () => {
    expect(answer({ nodes: two, wishes: [wish("huge", [8, 8, 8], { priority: 9 }), wish("small", [8])] })).toEqual([
      "huge: never-fits",
      "small: n1",
    ]);
  });
});

describe("where", () => {
  const placed = (zone: string, domain: string, name: string, held = 0) =>
    gpuNode(name, { zone, domain, held, free: 8 - held });
  const nodes = [
    placed("z1", "c1", "n1"),
    placed("z1", "c2", "n2"),
    placed("z1", "c2", "n3"),
    placed("z2", "c3", "n4"),
    placed("z2", "c3", "n5"),
  ];
  const within = (within: Within, devices: number[]) => answer({ nodes, wishes: [wish("a", devices, { within })] });

  test("close together where that is possible, and only so where it is asked for", () => {
    expect(within("any", [8, 8])).toEqual(["a: n2 n3"]);
    expect(within("any", [8, 8, 8])).toEqual(["a: n1 n2 n3"]);
    expect(within("any", [8, 8, 8, 8])).toEqual(["a: n1 n2 n3 n4"]);
    expect(within("zone", [8, 8, 8])).toEqual(["a: n1 n2 n3"]);
    expect(within("zone", [8, 8, 8, 8])).toEqual(["a: never-fits"]);
    expect(within("nvlink", [8, 8])).toEqual(["a: n2 n3"]);
    expect(within("nvlink", [8, 8, 8])).toEqual(["a: never-fits"]);
    expect(text({ nodes, wishes: [wish("a", [8, 8, 8], { within: "nvlink" })] })).toMatch(
      /needed within one NVLink domain: /,
    );
  });

  test("nodes without a zone are in no zone", () => {
    expect(answer({ nodes: four, wishes: [wish("a", [8, 8], { within: "zone" })] })).toEqual(["a: never-fits"]);
  });

  test("a node that failed the group twice is avoided while others could hold it soon, and said", () => {
    const failedOn = { n1: 2, n2: 1 };
    expect(answer({ nodes: four, wishes: [wish("a", [8, 8], { failedOn })] })).toEqual(["a: n2 n3"]);
    const full = [gpuNode("n1"), gpuNode("n2", { held: 8, free: 0 })];
    expect(answer({ nodes: full, wishes: [wish("a", [8], { failedOn })] })).toEqual(["a: capacity-short"]);
    expect(text({ nodes: full, wishes: [wish("a", [8], { failedOn })] })).toMatch(
      /n1: avoided, it failed this group 2 times/,
    );
    expect(answer({ nodes: full.slice(0, 1), wishes: [wish("a", [8], { failedOn })] })).toEqual(["a: n1"]);
    const sinceMs = NOW - gangLimits.keepMs;
    const long = wish("a", [8], { failedOn, sinceMs });
    expect(answer({ nodes: full, wishes: [long] }), "it has waited long enough for the others").toEqual(["a: n1"]);
  });

  test("selector, product and taints are the scheduler's", () => {
    const taint = { key: "team", value: "red", effect: "NoSchedule" };
    const mixed = [gpuNode("n1", { taints: [taint] }), gpuNode("n2", { labels: { pool: "a" } }), gpuNode("n3")];
    const at = (selection: GangWish["selection"]) => answer({ nodes: mixed, wishes: [wish("a", [8], { selection })] });
    expect(at({})).toEqual(["a: n2"]);
    expect(at({ tolerations: [{ key: "team", operator: "Exists" }] })).toEqual(["a: n1"]);
    expect(at({ nodeSelector: { pool: "a" } })).toEqual(["a: n2"]);
    expect(at({ product: "H100" })).toEqual(["a: never-fits"]);
  });
});

describe("what blocks a gang before any room is looked for", () => {
  const a = wish("a", [8, 8]);
  const blocked = (pods: GangPod[]) => answer({ nodes: four, wishes: [a], pods });

  test("pods that are missing or ask for something else, gates of others, pods of an older life", () => {
    expect(blocked([])).toEqual(["a: pods-missing"]);
    expect(blocked(podsOf(a).slice(1))).toEqual(["a: pods-missing"]);
    expect(blocked(podsOf(a, () => ({ devices: 4 })))).toEqual(["a: pods-missing"]);
    expect(
      blocked(podsOf(a, ({ worker }) => ({ foreignGates: worker === 1 ? ["kueue.x-k8s.io/admission"] : [] }))),
    ).toEqual(["a: foreign-gate"]);
    const older = podsOf({ ...a, incarnation: 0n }, () => ({ isLeaving: true }));
    expect(blocked([...podsOf(a), ...older])).toEqual(["a: release not-wanted", "a: older-incarnation"]);
  });

  test("pods of an incarnation that the group has not been seen at yet are left alone", () => {
    expect(blocked([...podsOf({ ...a, incarnation: 2n })])).toEqual(["a: newer-incarnation", "a: older-incarnation"]);
  });
});

describe("letting go", () => {
  const a = wish("a", [8, 8]);
  const seats: Seat[] = [
    { worker: 0, node: "n1", devices: 8 },
    { worker: 1, node: "n2", devices: 8 },
  ];
  const written = { seats, sinceMs: NOW };
  const open = (change: (pod: GangPod) => Partial<GangPod> = () => ({})) =>
    podsOf(a, (pod) => ({ state: "released", written, ...change(pod) }));
  const bound = (pod: GangPod): Partial<GangPod> => ({ state: "bound", node: seats[pod.worker]?.node ?? "" });
  const held = four.map((node) => (node.name < "n3" ? { ...node, held: 8, free: 0 } : node));
  const half = [gpuNode("n1", { held: 8, free: 0 }), ...four.slice(1)];
  const at = (pods: GangPod[], scene: Partial<Scene> = {}) => answer({ nodes: half, wishes: [a], pods, ...scene });

  test("G2: not whole T after the reservation is given back whole, and not a moment before", () => {
    const pods = open((pod) => (pod.worker === 0 ? bound(pod) : {}));
    expect(at(pods, { nowMs: NOW + T - 1 })).toEqual(["a: binding"]);
    expect(run({ nodes: half, wishes: [a], pods, nowMs: NOW + T - 1 }).wakeMs).toBe(NOW + T);
    const released = run({ nodes: half, wishes: [a], pods, nowMs: NOW + T }).decisions[0];
    expect(released).toMatchObject({ kind: "release", code: "not-whole", blamed: ["n2"] });
    expect(released?.kind === "release" && released.text).toBe(
      "1 of 2 pods are bound 120 s after the reservation; all of it is given back",
    );
    expect(at(open(bound), { nodes: held, nowMs: NOW + 100 * T })).toEqual([]);
  });

  test("a pod that ended, has gone, was bound elsewhere or lost its node ends the gang at once", () => {
    expect(at(open((pod) => (pod.worker === 0 ? { state: "over", node: "n1" } : {})))).toEqual([
      "a: release pod-ended",
    ]);
    expect(at(open((pod) => ({ isLeaving: pod.worker === 1 })))).toEqual(["a: release pod-ended"]);
    expect(at(open().slice(1))).toEqual(["a: release pod-gone"]);
    expect(at(open((pod) => (pod.worker === 0 ? { state: "bound", node: "n3" } : {})))).toEqual([
      "a: release misplaced",
    ]);
    expect(at(open(), { nodes: four.slice(1) })).toEqual(["a: release node-lost"]);
    const cordoned = four.map((node) => ({ ...node, closed: { code: "cordoned", text: "it is cordoned" } as const }));
    expect(at(open(), { nodes: cordoned })).toEqual(["a: release node-lost"]);
    const heldAndCordoned = held.map((node) => ({
      ...node,
      closed: { code: "cordoned", text: "it is cordoned" } as const,
    }));
    expect(at(open(bound), { nodes: heldAndCordoned })).toEqual([]);
    expect(at(open(bound), { nodes: held.slice(1) })).toEqual(["a: release node-lost"]);
  });

  test("G5: two reservations on one gang, or a gate that others opened, release it", () => {
    const other = { seats: seats.with(1, { worker: 1, node: "n4", devices: 8 }), sinceMs: NOW };
    expect(at(open((pod) => (pod.worker === 1 ? { written: other } : {})))).toEqual(["a: release torn"]);
    expect(at(open((pod) => (pod.worker === 1 ? { written: { seats, sinceMs: NOW + 1 } } : {})))).toEqual([
      "a: release torn",
    ]);
    expect(at(podsOf(a, ({ worker }) => (worker === 0 ? { state: "released" } : {})))).toEqual([
      "a: release opened-by-another",
    ]);
    expect(at(open(), { wishes: [{ ...a, devices: [8, 4] }] })).toEqual(["a: release torn"]);
  });

  test("a group that has gone releases its pods; so does one at another incarnation", () => {
    expect(at(open(), { wishes: [] })).toEqual(["a: release not-wanted"]);
    expect(at(open(), { wishes: [{ ...a, incarnation: 2n }] })).toEqual([
      "a: release not-wanted",
      "a: older-incarnation",
    ]);
  });

  test("G1: reserved GPUs that others took cost the least of priority first, then the youngest", () => {
    const taken = four.map((node) => (node.name === "n1" ? { ...node, held: 4, free: 4 } : node));
    const gang = (group: string, changes: Partial<GangWish>, sinceMs: number) => {
      const wished = wish(group, [4], changes);
      const one: Seat[] = [{ worker: 0, node: "n1", devices: 4 }];
      return { wished, pods: podsOf(wished, () => ({ state: "released", written: { seats: one, sinceMs } })) };
    };
    const scene = (...gangs: ReturnType<typeof gang>[]): Scene => ({
      nodes: taken,
      wishes: gangs.map(({ wished }) => wished),
      pods: gangs.flatMap(({ pods }) => pods),
    });
    expect(answer(scene(gang("x", {}, NOW - 1), gang("y", {}, NOW)))).toEqual([
      "x: binding",
      "y: release devices-taken",
    ]);
    expect(answer(scene(gang("x", {}, NOW - 1), gang("y", { priority: 1 }, NOW)))).toEqual([
      "x: release devices-taken",
      "y: binding",
    ]);
  });

  test("GPUs of a gang that goes are not given away while its pods may still be bound", () => {
    const next = wish("b", [8, 8]);
    const pods = [...open(), ...podsOf(next)];
    const nodes = four.slice(0, 2);
    expect(answer({ nodes, wishes: [next], pods })).toEqual(["a: release not-wanted", "b: capacity-short"]);
    const closed = [...podsOf(a), ...podsOf(next)];
    expect(answer({ nodes, wishes: [next], pods: closed })).toEqual(["a: release not-wanted", "b: n1 n2"]);
  });

  test("after a failover one pod that carries the reservation is enough to go on", () => {
    const one = podsOf(a, ({ worker }) => (worker === 1 ? { state: "released", written } : {}));
    const after = run({
      nodes: four,
      wishes: [a, wish("b", [8, 8], { priority: 5 })],
      pods: [...one, ...podsOf(wish("b", [8, 8]))],
    });
    expect(short(after.decisions)).toEqual(["a: binding", "b: n3 n4"]);
    expect(after.ledger.get("a#1")?.seats).toEqual(seats);
    expect(rebuild(one)).toEqual(new Map([["a#1", { group: "a", incarnation: 1n, ...written }]]));
  });
});

test("5,000 nodes: 40,000 GPUs are placed in one step", () => {
  const nodes = Array.from({ length: 5000 }, (_, index) =>
    gpuNode(`gpu-${index}`, { zone: `z${index % 4}`, domain: `rack-${Math.floor(index / 9)}` }),
  );
  const wishes = Array.from({ length: 200 }, (_, deployment) =>
    Array.from({ length: deployment % 2 === 0 ? 25 : 3 }, (_, replica) =>
      wish(
        `d${deployment}-${replica}`,
        Array.from({ length: deployment % 2 === 0 ? 1 : 8 }, () => 8),
        { sinceMs: NOW + deployment },
      ),
    ),
  ).flat();
  const pods = wishes.flatMap((each) => podsOf(each));
  const begin = performance.now();
  const first = step(new Map(), { nowMs: NOW, nodes, wishes, pods });
  const middle = performance.now();
  step(first.ledger, { nowMs: NOW, nodes, wishes, pods });
  const end = performance.now();
  const placed = first.decisions.reduce((sum, each) => sum + (each.kind === "reserve" ? each.seats.length * 8 : 0), 0);
  console.log(
    `${wishes.length} gangs, ${placed} GPUs placed in ${(middle - begin).toFixed(0)} ms; a step in which nothing changes ${(end - middle).toFixed(0)} ms`,
  );
  expect(placed).toBeGreaterThan(38_000);
  expect(middle - begin).toBeLessThan(20_000);
});
