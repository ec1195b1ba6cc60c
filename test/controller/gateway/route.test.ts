// Filter, score, pick: the small domain enumerated, the rest as properties.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { affinity, type Candidate, costOf, type Need, replacedBy, route } from "../../../controller/gateway/route.ts";

const idle = { running: 0, waiting: 0, queueMax: 8, unseen: 0, kvFree: 1 };
const replica = (name: string, changes: Partial<Candidate> = {}): Candidate => ({
  name,
  revision: "r1",
  numericsId: "n1",
  isDraining: false,
  isResting: false,
  load: idle,
  ...changes,
});
const busy = (running: number) => ({ load: { ...idle, running } });
const fresh = (sticky = "s"): Need => ({ origin: undefined, sticky, isNew: true, revision: "r1", bound: undefined });
const begun = (numericsId = "n1"): Need => ({ ...fresh(), origin: { revision: "r1", numericsId }, isNew: false });

const candidates = fc.uniqueArray(
  fc.record({
    name: fc.constantFrom("a", "b", "c", "d"),
    revision: fc.constantFrom("r1", "r2"),
    numericsId: fc.constantFrom("n1", "n2"),
    isDraining: fc.boolean(),
    isResting: fc.boolean(),
    load: fc.record({
      running: fc.nat(20),
      waiting: fc.nat(10),
      queueMax: fc.constantFrom(0, 8),
      unseen: fc.nat(5),
      kvFree: fc.double({ min: 0, max: 1, noNaN: true }),
    }),
  }),
  { selector: ({ name }) => name },
);
const need: fc.Arbitrary<Need> = fc.record({
  origin: fc.option(fc.record({ revision: fc.constantFrom("r1", "r2"), numericsId: fc.constantFrom("n1", "n2") }), {
    nil: undefined,
  }),
  sticky: fc.string(),
  isNew: fc.boolean(),
  revision: fc.constantFrom("r1", "r2"),
  bound: fc.constantFrom("r1", "r2", undefined),
});

describe("properties", () => {
  test("R1: what has begun never leaves its revision, and its numerics id only where nobody has it", () => {
    fc.assert(
      fc.property(candidates, need, (all, asked) => {
        const to = route(all, asked);
        const { origin } = asked;
        if (to === undefined || origin === undefined) return;
        expect(to.revision).toBe(origin.revision);
        const exact = all.filter(
          (one) =>
            one.revision === origin.revision &&
            one.numericsId === origin.numericsId &&
            !one.isResting &&
            one.isDraining === to.isDraining,
        );
        if (exact.length > 0) expect(to.numericsId).toBe(origin.numericsId);
      }),
    );
  });

  test("R2, R3: nothing new goes where it drains; what rests gets only a first try that has no other place", () => {
    fc.assert(
      fc.property(candidates, need, (all, asked) => {
        const to = route(all, asked);
        if (to === undefined) return;
        if (asked.origin === undefined) expect(to.isDraining).toBe(false);
        if (!to.isResting) return;
        expect(asked.isNew).toBe(true);
        expect(all.every((one) => one.isResting)).toBe(true);
      }),
    );
  });

  test("R4: a new choice takes a revision that is not wanted only where every wanted replica has a queue", () => {
    fc.assert(
      fc.property(candidates, fc.string(), (all, sticky) => {
        const to = route(all, { ...fresh(sticky), isNew: false });
        const isFree = ({ isDraining, isResting, load }: Candidate) => !isDraining && !isResting && load.waiting === 0;
        const wanted = all.filter((one) => one.revision === "r1" && isFree(one));
        if (wanted.length > 0) expect(to?.revision).toBe("r1");
      }),
    );
  });

  test("R6: what has not begun goes only where another choice of its request has", () => {
    fc.assert(
      fc.property(candidates, need, (all, asked) => {
        const to = route(all, { ...asked, origin: undefined });
        if (to !== undefined && asked.bound !== undefined) expect(to.revision).toBe(asked.bound);
      }),
    );
  });

  test("the same world gives the same replica, in whatever order it is told", () => {
    fc.assert(
      fc.property(candidates, need, (all, asked) => {
        expect(route(all.toReversed(), asked)?.name).toBe(route(all, asked)?.name);
      }),
    );
  });
});

test("R5: conversations spread evenly and keep their replica; one that goes moves only its own", () => {
  const all = ["a", "b", "c"].map((name) => replica(name));
  const conversations = Array.from({ length: 3_000 }, (_, index) => `conversation ${index}`);
  const before = conversations.map((sticky) => route(all, fresh(sticky))?.name ?? "");
  for (const name of ["a", "b", "c"]) {
    const share = before.filter((one) => one === name).length / before.length;
    expect(share).toBeGreaterThan(0.28);
    expect(share).toBeLessThan(0.39);
  }
  const after = conversations.map((sticky) => route(all.slice(0, 2), fresh(sticky))?.name ?? "");
  for (const [index, name] of before.entries()) if (name !== "c") expect(after[index]).toBe(name);
});

test("R5: the own replica is kept up to the slack, then the least loaded is taken", () => {
  const own = affinity("s", "a") > affinity("s", "b") ? "a" : "b";
  const other = own === "a" ? "b" : "a";
  const to = (ownRunning: number, otherRunning: number) =>
    route([replica(own, busy(ownRunning)), replica(other, busy(otherRunning))], fresh())?.name;
  expect(to(4, 0)).toBe(own);
  expect(to(5, 0)).toBe(other);
  expect(to(124, 100)).toBe(own);
  expect(to(126, 100)).toBe(other);
});

test("cost: waiting counts twice, what is not yet in the figures counts, tight KV counts as sequences", () => {
  expect(costOf({ ...idle, running: 3, waiting: 2, unseen: 1 })).toBe(8);
  expect(costOf({ ...idle, kvFree: 0.1 })).toBe(0);
  expect(costOf({ ...idle, kvFree: 0.05 })).toBe(8);
  expect(costOf({ ...idle, kvFree: 0 })).toBe(16);
});

test("a full queue is avoided while another has room, whoever is wanted", () => {
  const full = { load: { ...idle, waiting: 8 } };
  expect(route([replica("a", full), replica("b", busy(100))], fresh())?.name).toBe("b");
  expect(route([replica("a", full), replica("b", { ...busy(100), revision: "r0" })], fresh())?.name).toBe("b");
  expect(route([replica("a", full)], fresh())?.name).toBe("a");
});

test("R4: the first replica of a new revision shares the work with the old ones once it has a queue", () => {
  const next = (waiting: number) => replica("b", { load: { ...idle, running: 8, waiting } });
  const old = replica("a", { ...busy(4), revision: "r0" });
  expect(route([old, next(0)], fresh())?.name).toBe("b");
  expect(route([old, next(9)], fresh())?.name).toBe("a");
});

test("R2: a replica that drains takes over only where no other of the revision serves", () => {
  const draining = replica("a", { isDraining: true });
  expect(route([draining], fresh())).toBeUndefined();
  expect(route([draining], begun())?.name).toBe("a");
  expect(route([draining, replica("b", { numericsId: "n2" })], begun())?.name).toBe("b");
  expect(route([draining, replica("b", { revision: "r2" })], begun())?.name).toBe("a");
});

test("replaced: only when nobody of the revision serves or may come back, and another serves", () => {
  const one = (revision: string, draining: boolean, isServing: boolean) => ({ revision, draining, isServing });
  const begun = { revision: "r1", wanted: "", hasBegun: true };
  expect(replacedBy(begun, [])).toBeUndefined();
  expect(replacedBy(begun, [one("r2", false, false)])).toBeUndefined();
  expect(replacedBy(begun, [one("r1", false, false), one("r2", false, true)])).toBeUndefined();
  expect(replacedBy(begun, [one("r1", true, true), one("r2", false, true)])).toBeUndefined();
  expect(replacedBy(begun, [one("r1", true, false), one("r2", false, true)])).toBe("r2");
  expect(replacedBy(begun, [one("r2", false, true)])).toBe("r2");
});

test("replaced: where another revision is wanted nobody waits for that to serve", () => {
  const one = (revision: string, draining: boolean, isServing: boolean) => ({ revision, draining, isServing });
  const begun = { revision: "r1", wanted: "r2", hasBegun: true };
  expect(replacedBy(begun, [])).toBe("r2");
  expect(replacedBy(begun, [one("r1", true, false)])).toBe("r2");
  expect(replacedBy(begun, [one("r1", true, true)])).toBeUndefined();
  expect(replacedBy(begun, [one("r1", false, false)])).toBeUndefined();
  expect(replacedBy({ ...begun, wanted: "r1" }, [one("r1", true, false)])).toBeUndefined();
  // What drains takes nothing that has not begun.
  expect(replacedBy({ ...begun, hasBegun: false }, [one("r1", true, true)])).toBe("r2");
});
