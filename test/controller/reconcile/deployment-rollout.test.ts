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
const CALM = { planName: NEW, leaving: new Map<string, string>(), usedBelow: 100, nowMs: NOW };
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
          yield { ...CALM, wanted, groups, kind, room };
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
            const next = nextSteps({ ...CALM, wanted, groups: now, kind, room: 4 });
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
    nextSteps({ ...CALM, wanted: 1, groups: [one], kind: "surge", room: 0, usedBelow: 4, ...change }).remove.length;
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
    const fleet: Fleet = { ...CALM, wanted: 2, planName: undefined, groups, kind: "surge", room: 4, usedBelow: 9 };
    expect(nextSteps(fleet)).toMatchObject({ create: 0, drain: [], remove: [] });
    expect(nextSteps({ ...fleet, wanted: 1 }).drain.map(({ spec }) => spec.ordinal)).toEqual([1]);
  });
});

describe("O5: nodes that are to be left", () => {
  const LEFT = "gpu-left";
  const FORMS_LEFT = ["serving", "loading", "unplaced", "left-serving", "left-loading", "old-serving"] as const;
  const fleet = { ...CALM, leaving: new Map([[LEFT, "is cordoned"]]) };

  function made(form: (typeof FORMS_LEFT)[number], ordinal: number): GroupView {
    const status = form === "unplaced" ? {} : form.endsWith("serving") ? SERVING : LOADING;
    const there = [{ worker: 0, node: LEFT, pod: "p", firstRank: 0, ranks: 4 }];
    const plan = form.startsWith("old") ? OLD : NEW;
    return group({ ordinal, plan, status: form.startsWith("left") ? { ...status, placement: there } : status });
  }

  function* fleetsOf(sizeMax: number, from = 0, chosen: GroupView[] = []): Generator<GroupView[]> {
    yield chosen;
    if (chosen.length === sizeMax) return;
    for (let index = from; index < FORMS_LEFT.length; index++) {
      const form = FORMS_LEFT[index];
      if (form !== undefined) yield* fleetsOf(sizeMax, index, [...chosen, made(form, chosen.length)]);
    }
  }

  function* casesOf(): Generator<Fleet> {
    for (const groups of fleetsOf(4))
      for (const wanted of [1, 2, 3])
        for (const kind of ["surge", "inPlace"] as const)
          for (const room of [undefined, 0, 1, 4]) yield { ...fleet, groups, wanted, kind, room };
  }

  test("one more than is wanted, and whoever serves there goes only while enough others serve", () => {
    let [replaced, released] = [0, 0];
    for (const one of casesOf()) {
      const steps = nextSteps(one);
      const { groups, wanted, kind } = one;
      if (groups.some(({ spec }) => spec.plan === OLD)) continue;
      if (steps.create > 0 && groups.length >= wanted) {
        replaced += 1;
        expect(groups.length + steps.create, told(one, steps)).toBe(wanted + 1);
        expect(one.room, told(one, steps)).not.toBe(0);
      }
      const serving = groups.filter(isServing).length;
      const after = stays(steps, groups).filter(isServing).length;
      if (after < serving) released += 1;
      expect(after, told(one, steps)).toBeGreaterThanOrEqual(Math.min(serving, wanted));
      // A place that is loaded there is better than none.
      expect(stays(steps, groups).length + steps.create, told(one, steps)).toBeGreaterThanOrEqual(
        Math.min(groups.length, wanted),
      );
      if (kind === "inPlace")
        expect(told(one, nextSteps({ ...one, kind: "surge" }))).toContain(`"create":${steps.create}`);
    }
    expect(replaced).toBeGreaterThan(50);
    expect(released).toBeGreaterThan(50);
  });

  test("without room it stays, and is short; with room nobody stays there", () => {
    const one = made("left-serving", 0);
    const bare: Fleet = { ...fleet, groups: [one], wanted: 1, kind: "surge", room: 0 };
    expect(nextSteps(bare)).toMatchObject({ create: 0, drain: [], isShort: true, leaving: [one] });
    for (const groups of fleetsOf(4))
      for (const wanted of [1, 2, 3])
        for (const kind of ["surge", "inPlace"] as const) {
          let now = groups;
          let ordinal = 50;
          for (let turn = 0; turn < 60; turn++) {
            const next = nextSteps({ ...fleet, groups: now, wanted, kind, room: 4 });
            if (next.create + next.drain.length + next.remove.length === 0 && now.every(isServing)) break;
            const fresh = Array.from({ length: next.create }, () => group({ ordinal: ordinal++, plan: NEW }));
            now = [...now.filter((each) => !next.remove.includes(each)).map((each) => further(each, next)), ...fresh];
          }
          expect(now.map(({ spec, status }) => `${spec.plan} ${status.placement?.[0]?.node}`)).toEqual(
            Array.from({ length: wanted }, () => `${NEW} gpu-1`),
          );
        }
  });

  function further(one: GroupView, steps: Steps): GroupView {
    const next = played(one, steps);
    const { placement } = one.status;
    return next.status.phase !== "Serving" || placement === undefined
      ? next
      : { ...next, status: { ...next.status, placement } };
  }
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
