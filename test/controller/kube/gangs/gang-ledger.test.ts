// D1: whatever happens, the ledger that looks at what has changed says the same as one step over everything.
import { isDeepStrictEqual } from "node:util";
import fc from "fast-check";
import { expect, test } from "vitest";
import { GangLedger } from "../../../../controller/kube/gangs/gang-ledger.ts";
import { type GangPod, gangKey } from "../../../../controller/kube/gangs/gang-pods.ts";
import type { GangStep, GangWorld } from "../../../../controller/kube/gangs/reservations.ts";
import type { GangCluster } from "./gang-cluster.ts";
import { type Event, events, freshCluster, happen } from "./gang-events.ts";

const NOTHING: GangWorld = { nowMs: 0, nodes: [], wishes: [], pods: [] };

/** One controller's ledger, told what differs from the world that it has seen last. */
class Follower {
  #world: GangWorld = NOTHING;
  readonly #ledger: GangLedger;

  constructor({ limits }: GangCluster) {
    const source = {
      nodes: () => this.#world.nodes,
      nodeOf: (name: string) => this.#world.nodes.find((node) => node.name === name),
      groups: () => groupsOf(this.#world),
      wishOf: (group: string) => this.#world.wishes.find((wish) => wish.group === group),
      podsOf: (group: string) => this.#world.pods.filter((pod) => pod.group === group),
    };
    this.#ledger = new GangLedger(source, limits);
  }

  /** Answers what it was told and which groups it says have changed. */
  follow(world: GangWorld): { told: Set<string>; changed: string[] } {
    const before = this.#world;
    this.#world = world;
    const of = ({ wishes, pods }: GangWorld, group: string) => [
      wishes.filter((wish) => wish.group === group),
      pods.filter((pod) => pod.group === group),
    ];
    const groups = new Set([...groupsOf(before), ...groupsOf(world)]);
    for (const group of groups) if (isDeepStrictEqual(of(before, group), of(world, group))) groups.delete(group);
    const names = [...before.nodes, ...world.nodes].map(({ name }) => name);
    const node = ({ nodes }: GangWorld, name: string) => nodes.find((each) => each.name === name);
    const nodes = new Set(names.filter((name) => !isDeepStrictEqual(node(before, name), node(world, name))));
    return { told: groups, changed: this.#ledger.update({ nowMs: world.nowMs, groups, nodes }) };
  }

  placeOf(group: string, incarnation: bigint): string {
    const reservation = this.#ledger.reservationOf(group, incarnation);
    return placeText(this.#ledger.decisionOf(group, incarnation), reservation?.seats);
  }
}

const groupsOf = ({ wishes, pods }: GangWorld) => new Set([...wishes, ...pods].map(({ group }) => group));

/** What Gangs.placeOf tells apart. How old a reservation is when it is given back is said in its text, and goes on. */
function placeText(decision: GangStep["decisions"][number] | undefined, seats: unknown): string {
  if (decision?.kind === "release") return `released ${decision.code} ${decision.blamed.join(",")}`;
  if (seats !== undefined) return `reserved ${JSON.stringify(seats)}`;
  return decision?.kind === "wait" ? `waits ${decision.code} ${decision.text}` : "nothing";
}

/** Answers how many groups were looked at, and how many there were. */
function check(history: readonly Event[]): { told: number; all: number } {
  const cluster = freshCluster();
  let follower = new Follower(cluster);
  let seen = { told: 0, all: 0 };
  let before = new Map<string, string>();
  for (const event of [...history, { kind: "decide", at: 0, size: 0 }]) {
    if (event.kind !== "decide") {
      happen(cluster, event);
      // Another process: it remembers nothing.
      if (event.kind === "restart" || event.kind === "zombie") {
        follower = new Follower(cluster);
        before = new Map();
      }
      continue;
    }
    const world = cluster.world();
    const { told, changed } = follower.follow(world);
    const made = cluster.decide();
    seen = { told: seen.told + told.size, all: seen.all + groupsOf(world).size };
    const after = new Map<string, string>();
    const gangs: (GangPod | GangWorld["wishes"][number])[] = [...world.pods, ...world.wishes];
    for (const gang of gangs) {
      const key = gangKey(gang);
      const decision = made.decisions.find((each) => gangKey(each) === key);
      const wanted = placeText(decision, made.ledger.get(key)?.seats);
      expect(follower.placeOf(gang.group, gang.incarnation), key).toBe(wanted);
      after.set(key, wanted);
      if (before.has(key) && before.get(key) !== wanted) expect(changed, `${key} is told`).toContain(gang.group);
    }
    before = after;
  }
  return seen;
}

test("D1: in random histories it decides as one step over all gangs does, and tells who is concerned", () => {
  let told = 0;
  let all = 0;
  fc.assert(
    fc.property(events, (history) => {
      const seen = check(history);
      told += seen.told;
      all += seen.all;
    }),
    { numRuns: 400 },
  );
  expect(told, "most groups have not changed").toBeLessThan(all);
});
