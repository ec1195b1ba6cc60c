import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  CONDITION_TYPES,
  type Condition,
  conditions,
  PHASES,
  phaseName,
  protoPhase,
  setCause,
  setCondition,
  timestampOf,
} from "../../../controller/api/conditions.ts";
import { Phase } from "../../../proto/gen/muster/v1/control.ts";

const update = fc.record({
  type: fc.constantFrom(...CONDITION_TYPES),
  status: fc.constantFrom("True" as const, "False" as const, "Unknown" as const),
  reason: fc.constantFrom("Ready", "Loading", "Short"),
  message: fc.constantFrom("", "a", "b", "x".repeat(5000)),
  observedGeneration: fc.integer({ min: 0, max: 3 }),
});
const START = Date.UTC(2026, 10, 2, 10, 0, 0);
/** Updates one minute apart. */
const minute = (index: number) => START + index * 60_000;

const replay = (updates: readonly Omit<Condition, "lastTransitionTime">[]) =>
  updates.reduce<readonly Condition[]>((list, one, index) => setCondition(list, one, minute(index)), []);

describe("conditions", () => {
  test("A1: lastTransitionTime is when the status last changed, whatever else did", () => {
    fc.assert(
      fc.property(fc.array(update, { maxLength: 30 }), (updates) => {
        for (const { type, lastTransitionTime } of replay(updates)) {
          const own = updates.flatMap((one, index) => (one.type === type ? [{ ...one, index }] : []));
          const changed = own.findLast(({ status }, place) => own[place - 1]?.status !== status);
          expect(lastTransitionTime).toBe(timestampOf(minute(changed?.index ?? -1)));
        }
      }),
    );
  });

  test("A2: the same update again answers the very list, at any time", () => {
    fc.assert(
      fc.property(fc.array(update, { minLength: 1, maxLength: 10 }), fc.nat(), (updates, later) => {
        const list = replay(updates);
        const last = updates.at(-1);
        if (last !== undefined) expect(setCondition(list, last, START + later)).toBe(list);
      }),
    );
  });

  test("each type is there once, says its last update, and the list is what the schema takes", () => {
    fc.assert(
      fc.property(fc.array(update, { maxLength: 30 }), (updates) => {
        const list = replay(updates);
        expect(conditions.parse(list)).toEqual(list);
        expect(list.map(({ type }) => type)).toEqual(
          CONDITION_TYPES.filter((type) => updates.some((one) => one.type === type)),
        );
        for (const { type, status, reason, observedGeneration } of list)
          expect({ type, status, reason, observedGeneration }).toEqual({
            type,
            status: updates.findLast((one) => one.type === type)?.status,
            reason: updates.findLast((one) => one.type === type)?.reason,
            observedGeneration: updates.findLast((one) => one.type === type)?.observedGeneration,
          });
      }),
    );
  });

  test("a list is not changed in place", () => {
    const list = replay([{ type: "Planned", status: "True", reason: "Planned", message: "", observedGeneration: 1 }]);
    const before = structuredClone(list);
    setCondition(list, { type: "Planned", status: "False", reason: "Gone", message: "", observedGeneration: 2 }, START);
    expect(list).toEqual(before);
  });
});

describe("the one cause", () => {
  const loading = { phase: "Loading" as const, cause: { code: "loading", message: "1 of 3" } };

  test("keeps its age while phase and code stay, though its text counts", () => {
    const first = setCause(undefined, loading, START);
    const counted = setCause(first, { ...loading, cause: { ...loading.cause, message: "2 of 3" } }, START + 9000);
    expect(counted.cause).toEqual({ code: "loading", message: "2 of 3", since: timestampOf(START) });
  });

  test("is new where phase or code changes", () => {
    const first = setCause(undefined, loading, START);
    const stalled = setCause(first, { phase: "Loading", cause: { code: "stalled", message: "" } }, START + 9000);
    const warm = setCause(first, { phase: "Warming", cause: { code: "loading", message: "" } }, START + 9000);
    expect([stalled.cause.since, warm.cause.since]).toEqual([timestampOf(START + 9000), timestampOf(START + 9000)]);
  });

  test("every phase of the contract has one name", () => {
    const named = Object.values(Phase).flatMap((value) => phaseName(value) ?? []);
    expect(named.toSorted()).toEqual([...PHASES].toSorted());
    for (const name of PHASES) expect(phaseName(protoPhase(name))).toBe(name);
    expect(phaseName(Phase.UNSPECIFIED)).toBeUndefined();
  });

  test("times are whole seconds in UTC", () => {
    expect(timestampOf(START + 999)).toBe("2026-11-02T10:00:00Z");
  });
});
