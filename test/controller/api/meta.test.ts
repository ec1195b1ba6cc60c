import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { groupName, OWNER_NAME_MAX, type Owner, planName } from "../../../controller/api/meta.ts";
import { ownerNameRule } from "../../../controller/api/parse.ts";
import { replicaGroupSpec } from "../../../controller/api/replica-group.ts";

const REVISION = "0123456789abcdef0123456789abcdef";
const HOST_NAME_MAX = 63;
/** Largest that stays readable in a pod's name: an incarnation of six digits and a worker of four. */
const POD_SUFFIX = "-999999-1023";

const owners = fc.record({
  kind: fc.constantFrom("ModelDeployment" as const, "DraftPool" as const),
  name: fc.stringMatching(/^[a-z](-?[a-z0-9]){0,6}$/).filter((name) => ownerNameRule.holds(name)),
});
const ordinals = fc.integer({ min: 0, max: 1_000_000 });
const isSame = (one: Owner, other: Owner) => one.kind === other.kind && one.name === other.name;

describe("names made from an owner's name", () => {
  test("two groups have one name only if they are one group", () => {
    fc.assert(
      fc.property(owners, ordinals, owners, ordinals, (one, first, other, second) => {
        const isOne = isSame(one, other) && first === second;
        expect(groupName(one, first) === groupName(other, second)).toBe(isOne);
      }),
    );
    // A name that is made to look like another's.
    const [pool, trap]: Owner[] = [
      { kind: "DraftPool", name: "chat" },
      { kind: "ModelDeployment", name: "chat-d0" },
    ];
    if (pool !== undefined && trap !== undefined) expect(groupName(pool, 0)).not.toBe(groupName(trap, 0));
  });

  test("a deployment and a pool of one name and revision have plans of their own", () => {
    const names = (["ModelDeployment", "DraftPool"] as const).map((kind) => planName({ kind, name: "chat" }, REVISION));
    expect(new Set(names).size).toBe(2);
  });

  test("the longest stay host names, pods included, and are what a group's spec takes", () => {
    for (const kind of ["ModelDeployment", "DraftPool"] as const) {
      const owner: Owner = { kind, name: "a".repeat(OWNER_NAME_MAX) };
      const group = groupName(owner, 1_000_000);
      expect(`${group}${POD_SUFFIX}`.length).toBeLessThanOrEqual(HOST_NAME_MAX);
      expect(planName(owner, REVISION).length).toBeLessThanOrEqual(HOST_NAME_MAX);
      const spec = { owner, plan: planName(owner, REVISION), ordinal: 1_000_000 };
      expect(replicaGroupSpec.safeParse(spec).success).toBe(true);
    }
  });
});
