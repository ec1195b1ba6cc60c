// What may happen to a small cluster of gangs: pods of others, lost nodes, dying controllers, two at once.
import fc from "fast-check";
import { gangLimits } from "../../../../controller/kube/gangs/reservations.ts";
import type { Within } from "../../../../controller/kube/gangs/rooms.ts";
import { GangCluster } from "./gang-cluster.ts";

export type Event = { kind: string; at: number; size: number };
const KINDS = [
  ...["wish", "wish", "create", "create", "create", "decide", "decide", "decide", "chore", "chore", "chore", "chore"],
  ...[
    "bind",
    "bind",
    "bind",
    "foreign",
    "leave",
    "vanish",
    "return",
    "cordon",
    "end",
    "restart",
    "zombie",
    "unwish",
    "wait",
    "late",
  ],
];
export const events: fc.Arbitrary<Event[]> = fc.array(
  fc.record({ kind: fc.constantFrom(...KINDS), at: fc.nat({ max: 99 }), size: fc.nat({ max: 99 }) }),
  { minLength: 40, maxLength: 160, size: "max" },
);
const NAMES = ["n1", "n2", "n3", "n4"];
const SHAPES: [number[], Within][] = [
  [[4], "any"],
  [[8], "any"],
  [[4, 4], "any"],
  [[8, 8], "any"],
  [[4, 4], "nvlink"],
  [[8, 8, 8], "any"],
  [[2, 2], "zone"],
];

export function freshCluster(): GangCluster {
  const cluster = new GangCluster({ ...gangLimits, wholeMs: 60_000, keepMs: 100_000 });
  for (const [index, name] of NAMES.entries()) {
    const zone = index < 2 ? "z1" : "z2";
    cluster.nodes.set(name, { gpus: 8, zone, clique: index < 2 ? "" : "c2", isThere: true, isCordoned: false });
  }
  return cluster;
}

export function happen(cluster: GangCluster, { kind, at, size }: Event): void {
  const name = NAMES[at % NAMES.length] ?? "n1";
  const keys = [...cluster.wishes.keys()];
  const key = keys[at % Math.max(1, keys.length)] ?? "";
  const state = cluster.nodes.get(name);
  switch (kind) {
    case "wish": {
      const [devices, within] = SHAPES[size % SHAPES.length] ?? [[8], "any"];
      if (!cluster.wishes.has(`models/g${at % 6}`)) cluster.wish(`g${at % 6}`, devices, { within, priority: size % 3 });
      break;
    }
    case "create":
      if (size % 4 === 0) cluster.createPods(key, 1);
      else for (const each of keys) cluster.createPods(each);
      break;
    case "chore":
      cluster.doChore(at);
      break;
    case "bind":
      cluster.bind(at);
      break;
    case "foreign":
      cluster.addForeign(`f${cluster.foreign.size}-${at}`, name, 1 + (size % 8));
      break;
    case "leave": {
      const [first] = cluster.foreign.keys();
      if (first) cluster.foreign.delete(first);
      break;
    }
    case "vanish":
      cluster.removeNode(name);
      break;
    case "return":
      for (const each of cluster.nodes.values()) each.isThere = true;
      break;
    case "cordon":
      if (state) state.isCordoned = !state.isCordoned;
      break;
    case "end":
      cluster.endPod(at);
      break;
    case "restart":
      cluster.restart();
      break;
    case "zombie":
      // Another controller takes over while the old one still does what it had decided.
      cluster.memory = new Map();
      break;
    case "unwish":
      cluster.wishes.delete(key);
      break;
    case "wait":
      cluster.nowMs += 1000 * (size % 20);
      break;
    case "late":
      cluster.nowMs += cluster.limits.wholeMs;
      break;
  }
}
