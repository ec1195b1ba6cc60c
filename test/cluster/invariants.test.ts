// The checker of invariants can fail: each rule is broken by a history made for it, and by nothing else; a history in which all
// goes well breaks none.
import { describe, expect, test } from "vitest";
import { LABELS } from "../../controller/api/meta.ts";
import type { KubeObject } from "../../controller/kube/api/client.ts";
import { GANG_GATE, RESERVED_AT, SEATS } from "../../controller/kube/gangs/gang-pods.ts";
import { Invariants, type Seen, type Watched } from "./kubelet/invariants.ts";

const BOUNDS = { servingMs: 1_000, staleMs: 5_000, halfMs: 10_000, overdrawnMs: 0 };
const GROUP_UID = "group-uid";

type PodWish = {
  worker?: number;
  incarnation?: number;
  node?: string;
  seats?: string;
  isGated?: boolean;
  phase?: string;
  isLeaving?: boolean;
  plan?: string;
};

const object = (kind: string, name: string, rest: Partial<KubeObject> & Record<string, unknown>): KubeObject => ({
  apiVersion: "v1",
  kind,
  ...rest,
  metadata: { name, namespace: "default", uid: `${name}-uid`, ...rest.metadata },
});

function pod(wish: PodWish = {}): KubeObject {
  const {
    worker = 0,
    incarnation = 1,
    node,
    seats = "n0=1,n1=1",
    isGated = false,
    phase = "Running",
    plan = "p",
  } = wish;
  return object("Pod", `g-${incarnation}-${worker}`, {
    metadata: {
      name: `g-${incarnation}-${worker}`,
      labels: {
        [LABELS.group]: "g",
        [LABELS.incarnation]: String(incarnation),
        [LABELS.worker]: String(worker),
        [LABELS.plan]: plan,
      },
      annotations: seats === "" ? {} : { [SEATS]: seats, [RESERVED_AT]: "2026-01-01T00:00:00.000Z" },
      ownerReferences: [{ apiVersion: "muster.dev/v1alpha1", kind: "ReplicaGroup", name: "g", uid: GROUP_UID }],
      ...(wish.isLeaving ? { deletionTimestamp: "2026-01-01T00:00:00Z" } : {}),
    },
    spec: {
      ...(node === undefined ? {} : { nodeName: node }),
      ...(isGated ? { schedulingGates: [{ name: GANG_GATE }] } : {}),
      containers: [{ name: "worker", resources: { limits: { "nvidia.com/gpu": "1" } } }],
    },
    status: { phase },
  });
}

const foreign = (name: string, node: string): KubeObject =>
  object("Pod", name, {
    spec: { nodeName: node, containers: [{ name: "main", resources: { limits: { "nvidia.com/gpu": "1" } } }] },
    status: { phase: "Running" },
  });

const node = (name: string): KubeObject =>
  object("Node", name, { status: { allocatable: { "nvidia.com/gpu": "1" }, conditions: [] } });

const lease = (holder: string): KubeObject =>
  object("Lease", "muster-controller", { spec: { holderIdentity: holder } });

type GroupWish = { phase?: string; incarnation?: number; restarts?: number; step?: number; plan?: string };

function group({ phase = "Serving", incarnation = 1, restarts = 0, step = 0, plan = "p" }: GroupWish = {}): KubeObject {
  return object("ReplicaGroup", "g", {
    apiVersion: "muster.dev/v1alpha1",
    metadata: { name: "g", uid: GROUP_UID },
    spec: { owner: { kind: "ModelDeployment", name: "nano" }, plan, ordinal: 0, state: "Serving" },
    status: { phase, incarnation, restarts, step },
  });
}

/** A world in which a gang of two serves on two nodes, up to 0 ms. */
class World {
  readonly invariants = new Invariants(BOUNDS);

  constructor() {
    for (const name of ["n0", "n1", "n2"]) this.see("nodes", node(name), 0);
    this.see("replicagroups", group({ phase: "Scheduling" }), 0);
    for (const worker of [0, 1]) this.see("pods", pod({ worker, isGated: true, seats: "" }), 0, "ADDED");
    for (const worker of [0, 1]) this.see("pods", pod({ worker }), 0);
    for (const worker of [0, 1]) this.see("pods", pod({ worker, node: `n${worker}` }), 0);
    this.see("replicagroups", group(), 0);
  }

  see(kind: Watched, seen: KubeObject, atMs: number, type: Seen["type"] = "MODIFIED"): this {
    this.invariants.see({ kind, type, object: seen, atMs });
    return this;
  }

  get rules(): string[] {
    return [...new Set(this.invariants.broken.map((text) => / (D\d): /.exec(text)?.[1] ?? text))];
  }
}

type History = (world: World) => unknown;
const BREAKS: readonly { what: string; rule: string; history: History }[] = [
  {
    what: "a foreign pod is bound to a GPU that is held",
    rule: "D1",
    history: (world) => world.see("pods", foreign("other", "n0"), 1, "ADDED"),
  },
  {
    what: "a seat is promised that another gang holds",
    rule: "D2",
    history: (world) => {
      const other = pod({ seats: "n0=1" });
      const labels = { ...other.metadata.labels, [LABELS.group]: "h" };
      world.see("pods", { ...other, metadata: { ...other.metadata, name: "h-1-0", labels, ownerReferences: [] } }, 1);
    },
  },
  {
    what: "a gate is opened without a seat",
    rule: "D2",
    history: (world) => world.see("pods", pod({ worker: 0, node: "n0", seats: "" }), 1),
  },
  {
    what: "a pod is bound elsewhere than its seat is",
    rule: "D2",
    history: (world) => world.see("pods", pod({ worker: 1, node: "n2" }), 1),
  },
  {
    what: "Serving is written though a pod has ended long ago",
    rule: "D3",
    history: (world) =>
      world
        .see("pods", pod({ worker: 1, node: "n1", phase: "Failed" }), 1)
        .see("replicagroups", group({ step: 5 }), BOUNDS.servingMs + 2),
  },
  {
    what: "who has just taken over says Serving anew of what has ended",
    rule: "D3",
    history: (world) =>
      world
        .see("pods", pod({ worker: 1, node: "n1", phase: "Failed" }), 1)
        .see("replicagroups", group({ phase: "Scheduling" }), 2)
        .see("leases", lease("other"), BOUNDS.servingMs)
        .see("replicagroups", group(), BOUNDS.servingMs + 2),
  },
  {
    what: "Serving stays though a pod has gone, and nobody writes anything",
    rule: "D3",
    history: (world) => {
      world.see("pods", pod({ worker: 1, node: "n1" }), 1, "DELETED");
      world.invariants.look(BOUNDS.staleMs + 3);
    },
  },
  {
    what: "a half stays open",
    rule: "D4",
    history: (world) => {
      world.see("replicagroups", group({ phase: "Scheduling" }), 1);
      world.see("pods", pod({ worker: 1, node: "n1" }), 1, "DELETED");
      world.invariants.look(BOUNDS.halfMs + 2);
    },
  },
  {
    what: "the incarnation goes back",
    rule: "D5",
    history: (world) => world.see("replicagroups", group({ incarnation: 0, phase: "Scheduling" }), 1),
  },
  {
    what: "it restarts more often than it may",
    rule: "D5",
    history: (world) => world.see("replicagroups", group({ restarts: 1 }), 1),
  },
  {
    what: "a pod of another plan is in the group",
    rule: "D6",
    history: (world) => world.see("pods", pod({ worker: 1, node: "n1", plan: "q" }), 1),
  },
  {
    what: "two incarnations are open at once",
    rule: "D6",
    history: (world) => {
      for (const worker of [0, 1]) world.see("pods", pod({ worker, phase: "Failed" }), 1);
      world.see("replicagroups", group({ phase: "Scheduling" }), 1);
      world.see("pods", pod({ worker: 0, incarnation: 2, seats: "n2=1" }), 2, "ADDED");
      world.see("pods", pod({ worker: 0, incarnation: 3, seats: "n1=1" }), 2, "ADDED");
    },
  },
  {
    what: "a ShardPlan is edited",
    rule: "D7",
    history: (world) =>
      world
        .see("shardplans", object("ShardPlan", "p", { spec: { revision: "a" } }), 1, "ADDED")
        .see("shardplans", object("ShardPlan", "p", { spec: { revision: "b" } }), 2),
  },
];

describe("invariants of a real cluster", () => {
  test.each(BREAKS)("$rule is broken where $what", ({ rule, history }) => {
    const world = new World();
    expect(world.rules).toEqual([]);
    history(world);
    // What is held twice is promised twice.
    expect(world.rules).toEqual(rule === "D1" ? ["D1", "D2"] : [rule]);
  });

  test("a death, a restart and a scale to zero break none, and every rule was looked at", () => {
    const world = new World();
    world.invariants.restartsMax = 1;
    world.see("pods", pod({ worker: 1, node: "n1", phase: "Failed" }), 100);
    world.see("replicagroups", group({ phase: "Scheduling" }), 200);
    world.see("pods", pod({ worker: 0, node: "n0", isLeaving: true }), 300);
    for (const worker of [0, 1]) world.see("pods", pod({ worker, node: `n${worker}` }), 400, "DELETED");
    world.see("replicagroups", group({ phase: "Scheduling", incarnation: 2, restarts: 1 }), 500);
    for (const worker of [0, 1])
      world.see("pods", pod({ worker, incarnation: 2, isGated: true, seats: "" }), 600, "ADDED");
    for (const worker of [0, 1]) world.see("pods", pod({ worker, incarnation: 2, seats: "n2=1,n1=1" }), 700);
    for (const [worker, on] of ["n2", "n1"].entries())
      world.see("pods", pod({ worker, incarnation: 2, seats: "n2=1,n1=1", node: on }), 800);
    world.see("replicagroups", group({ incarnation: 2, restarts: 1 }), 900);
    world.invariants.look(60_000);
    world.see("replicagroups", group({ incarnation: 2, restarts: 1 }), 60_001, "DELETED");
    for (const worker of [0, 1])
      world.see("pods", pod({ worker, incarnation: 2, seats: "n2=1,n1=1", node: "n2" }), 60_002, "DELETED");
    world.invariants.look(120_000);
    expect(world.invariants.broken).toEqual([]);
    expect(Object.entries(world.invariants.met).filter(([, times]) => times === 0)).toEqual([]);
    expect(world.invariants.objects("pods")).toEqual([]);
  });

  test("what lasts begins anew where another controller leads", () => {
    const world = new World();
    world.see("leases", lease("one"), 0, "ADDED");
    world.see("pods", pod({ worker: 1, node: "n1" }), 1, "DELETED");
    world.see("leases", lease("other"), BOUNDS.staleMs);
    // It writes what it has found, and has had no time to find more.
    world.see("replicagroups", group({ step: 5 }), BOUNDS.staleMs + BOUNDS.servingMs - 1);
    world.invariants.look(2 * BOUNDS.staleMs - 1);
    expect(world.rules).toEqual([]);
    world.invariants.look(2 * BOUNDS.staleMs + 1);
    expect(world.rules).toContain("D3");
  });
});
