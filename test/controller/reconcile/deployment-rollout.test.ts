// Every small fleet: which replicas come and go. The domain is enumerated, not sampled.
import { describe, expect, test } from "vitest";
import { deviceOf, gpuInventory } from "../../../controller/plan/hardware.ts";
import {
  type Fleet,
  groupsThatFit,
  isServing,
  nextSteps,
  type Steps,
  surgeMax,
} from "../../../controller/reconcile/deployment/rollout.ts";
import type { GroupView } from "../../../controller/reconcile/deployment/world.ts";
import { group, LOADING, NOW, SERVING } from "./deployment-views.ts";

const NEW = "chat-new00";
const OLD = "chat-old00";
/** What one group of a small fleet may be. */
const FORMS = ["new-serving", "new-loading", "old-serving", "old-loading", "old-draining"] as const;

function formed(form: (typeof FORMS)[number], ordinal: number): GroupView {
  const plan = form.startsWith("new") ? NEW : OLD;
  const status = form.endsWith("serving") ? SERVING : LOADING;
  if (form === "old-draining") return group({ ordinal, plan, status, state: "Draining", drainUntilMs: NOW + 60_000 });
  return group({ ordinal, plan, status });
}

/** Old groups have been made before new ones. */
function* fleets(sizeMax: number): Generator<GroupView[]> {
  const of = (forms: readonly (typeof FORMS)[number][]): GroupView[] =>
    [...forms].sort((one, other) => (one < other ? 1 : -1)).map(formed);
  function* choose(from: number, left: number, chosen: readonly (typeof FORMS)[number][]): Generator<GroupView[]> {
    yield of(chosen);
    if (left === 0) return;
    for (let index = from; index < FORMS.length; index++) {
      const form = FORMS[index];
      if (form !== undefined) yield* choose(index, left - 1, [...chosen, form]);
    }
  }
  yield* choose(0, sizeMax, []);
}

function* cases(): Generator<Fleet> {
  for (const groups of fleets(5))
    for (const wanted of [0, 1, 2, 3, 4])
      for (const kind of ["surge", "inPlace"] as const)
        for (const room of [undefined, 0, 1, 4]) {
          yield { wanted, planName: NEW, groups, kind, room, usedBelow: 100, nowMs: NOW };
        }
}

const stays = (steps: Steps, groups: readonly GroupView[]) =>
  groups.filter((one) => one.spec.state === "Serving" && !steps.drain.includes(one));
const told = ({ groups, ...rest }: Fleet, steps: Steps) =>
  JSON.stringify({
    ...rest,
    groups: groups.map(({ name, status }) => `${name} ${status.phase}`),
    create: steps.create,
    drain: steps.drain.map(({ name }) => name),
  });

describe("every fleet of at most five groups", () => {
  test("O1: groups are never more than wanted and surge, in place never more than wanted", () => {
    let created = 0;
    for (const fleet of cases()) {
      const steps = nextSteps(fleet);
      if (steps.create === 0) continue;
      created += 1;
      const total = fleet.groups.length + steps.create;
      const isRollout = fleet.groups.some(({ spec }) => spec.plan !== NEW);
      const most = fleet.kind === "inPlace" && isRollout ? fleet.wanted : fleet.wanted + surgeMax(fleet.wanted);
      expect(total, told(fleet, steps)).toBeLessThanOrEqual(most);
      const current = fleet.groups.filter(({ spec }) => spec.plan === NEW).length;
      expect(current + steps.create, told(fleet, steps)).toBeLessThanOrEqual(fleet.wanted);
    }
    expect(created).toBeGreaterThan(500);
  });

  test("O2: a surge keeps what serves; in place at most the stated share is missing because of it", () => {
    let drained = 0;
    for (const fleet of cases()) {
      const steps = nextSteps(fleet);
      const before = fleet.groups.filter(isServing).length;
      const after = stays(steps, fleet.groups).filter(isServing).length;
      if (after === before) continue;
      drained += 1;
      const least = fleet.kind === "surge" ? fleet.wanted : fleet.wanted - surgeMax(fleet.wanted);
      expect(after, told(fleet, steps)).toBeGreaterThanOrEqual(Math.min(before, Math.max(0, least)));
    }
    expect(drained).toBeGreaterThan(500);
  });

  test("O3: of the plan's own groups what is too many goes, idle before serving, newest before oldest; none else", () => {
    for (const fleet of cases()) {
      const steps = nextSteps(fleet);
      const current = fleet.groups.filter(({ spec }) => spec.plan === NEW);
      const gone = steps.drain.filter(({ spec }) => spec.plan === NEW);
      expect(gone.length, told(fleet, steps)).toBe(Math.max(0, current.length - fleet.wanted));
      const kept = current.filter((one) => !gone.includes(one));
      for (const one of gone)
        for (const other of kept) {
          const isLess = !isServing(one) && isServing(other);
          const isNewer = isServing(one) === isServing(other) && one.spec.ordinal > other.spec.ordinal;
          expect(isLess || isNewer, told(fleet, steps)).toBe(true);
        }
    }
  });

  test("nothing is drained twice, and draining ones are left alone", () => {
    for (const fleet of cases()) {
      const { drain } = nextSteps(fleet);
      expect(new Set(drain).size).toBe(drain.length);
      expect(drain.every(({ spec }) => spec.state === "Serving")).toBe(true);
    }
  });

  test("played on, every fleet comes to rest with exactly what is wanted, of the plan", () => {
    let steps = 0;
    for (const groups of fleets(4))
      for (const wanted of [0, 1, 2, 3])
        for (const kind of ["surge", "inPlace"] as const) {
          let now: GroupView[] = groups;
          let ordinal = 50;
          for (let turn = 0; turn < 60; turn++) {
            const next = nextSteps({ wanted, planName: NEW, groups: now, kind, room: 4, usedBelow: 100, nowMs: NOW });
            if (next.create + next.drain.length + next.remove.length === 0 && now.every(isServing)) break;
            steps += 1;
            const made = Array.from({ length: next.create }, () => group({ ordinal: ordinal++, plan: NEW }));
            const left = now.filter((one) => !next.remove.includes(one));
            now = [...left.map((one) => played(one, next)), ...made];
          }
          expect(now.map(({ spec, status }) => `${spec.plan} ${status.phase}`)).toEqual(
            Array.from({ length: wanted }, () => `${NEW} Serving`),
          );
        }
    expect(steps).toBeGreaterThan(1_000);
  });
});

/** One turn later: what loads serves, what drains has stopped. */
function played(one: GroupView, { drain }: Steps): GroupView {
  if (drain.includes(one))
    return { ...one, spec: { ...one.spec, state: "Draining" }, drainUntilMs: NOW + 60_000, generation: 2 };
  if (one.spec.state === "Draining")
    return { ...one, status: { ...one.status, phase: "Stopped", observedGeneration: one.generation } };
  return { ...one, status: SERVING };
}

describe("leaving", () => {
  const draining = group({ ordinal: 3, plan: OLD, state: "Draining", status: SERVING, drainUntilMs: NOW + 1_000 });
  const removed = (one: GroupView, change: Partial<Fleet> = {}) =>
    nextSteps({ wanted: 1, planName: NEW, groups: [one], kind: "surge", room: 0, usedBelow: 4, nowMs: NOW, ...change })
      .remove.length;
  const stopped = { ...SERVING, phase: "Stopped" as const, observedGeneration: 1 };
  const begun = { incarnation: 1, revision: "r", begun: true, failures: [], restarts: 0 };

  test("O4: only drained, or with nothing to drain, or long after its time; only a written ordinal", () => {
    expect(removed(draining)).toBe(0);
    expect(removed({ ...draining, status: stopped })).toBe(1);
    expect(removed({ ...draining, status: { ...stopped, observedGeneration: 0 } })).toBe(0);
    expect(removed({ ...draining, status: stopped }, { usedBelow: 3 })).toBe(0);
    expect(removed({ ...draining, status: {} })).toBe(1);
    expect(removed({ ...draining, status: { record: begun } })).toBe(0);
    expect(removed(draining, { nowMs: NOW + 30_999 })).toBe(0);
    expect(removed(draining, { nowMs: NOW + 31_000 })).toBe(1);
    expect(removed({ ...draining, status: stopped, isLeaving: true })).toBe(0);
    expect(removed({ ...draining, spec: { ...draining.spec, state: "Serving" }, status: stopped })).toBe(0);
  });

  test("without a plan nothing comes, and what serves stays", () => {
    const groups = [0, 1].map((ordinal) => group({ ordinal, plan: OLD, status: SERVING }));
    const fleet: Fleet = { wanted: 2, planName: undefined, groups, kind: "surge", room: 4, usedBelow: 9, nowMs: NOW };
    expect(nextSteps(fleet)).toMatchObject({ create: 0, drain: [], remove: [] });
    expect(nextSteps({ ...fleet, wanted: 1 }).drain.map(({ spec }) => spec.ordinal)).toEqual([1]);
  });
});

test("groups find their places as a search over all ways to seat them does", () => {
  const device = deviceOf("H200");
  if (device === undefined) throw new Error("no H200 in the table");
  let compared = 0;
  for (const sizes of [[], [8], [4, 4], [8, 2], [8, 4, 4], [8, 8, 3], [2, 2, 2, 2], [6, 5, 4, 1]]) {
    const nodes = sizes.flatMap((count) => gpuInventory(device, count).nodes);
    for (const workers of [1, 2, 3])
      for (const each of [1, 2, 4]) {
        expect(groupsThatFit({ nodes }, workers * each, workers)).toBe(most(sizes, each, workers));
        compared += 1;
      }
  }
  expect(compared).toBe(72);
});

/** Brute force: seats a group on every choice of nodes and goes on. */
function most(free: readonly number[], each: number, workers: number): number {
  const known = new Map<string, number>();
  const search = (left: readonly number[]): number => {
    const key = left.toSorted().join(" ");
    const found = known.get(key);
    if (found !== undefined) return found;
    let best = 0;
    const choose = (from: number, chosen: readonly number[]): void => {
      if (chosen.length === workers) {
        best = Math.max(best, 1 + search(left.map((count, index) => (chosen.includes(index) ? count - each : count))));
        return;
      }
      for (let index = from; index < left.length; index++) {
        if ((left[index] ?? 0) >= each) choose(index + 1, [...chosen, index]);
      }
    };
    choose(0, []);
    known.set(key, best);
    return best;
  };
  return search(free);
}
