// Stored plans read again: how many models are kept for how many plans.
import { expect, test } from "vitest";
import { toResource } from "../../../../controller/api/shard-plan.ts";
import { GroupPlans, type PlanRead } from "../../../../controller/kube/groups/group-plans.ts";
import { readModel } from "../../../../controller/model/model.ts";
import { parseInventory } from "../../../../controller/plan/hardware.ts";
import { planShards } from "../../../../controller/plan/plan.ts";
import { wishesOf } from "../../../../controller/plan/wishes.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { fixtureUrl } from "../../plan/fixtures.ts";

test("R3: plans of one model share its spec, those of another do not", async () => {
  const specOf = async (source: string, ep?: number) => {
    const model = await readModel(source, { headersOnly: true });
    const inventory = parseInventory("8xH200");
    if (typeof inventory === "string") throw new Error(inventory);
    const planned = planShards(model, inventory, wishesOf({ pins: { ep } }));
    if (planned.kind !== "feasible") throw new Error(`${source} does not fit`);
    return toResource({ ...planned.plan, model }, { image: "worker@sha256:0", podTemplateDigest: "00" });
  };
  const maverick = fixtureUrl("llama-4-maverick");
  const specs = [await specOf(maverick, 8), await specOf(maverick, 2), await specOf(fixtureUrl("llama-4-scout"))];
  const seen = new Map<string, PlanRead>();
  const all = Promise.withResolvers<void>();
  const plans: GroupPlans = new GroupPlans({
    read: (source) => readModel(source, { headersOnly: true }),
    clock: realTime,
    random: () => 0,
    onChange: (uid) => {
      const spec = specs[Number(uid)];
      if (spec !== undefined) seen.set(uid, plans.planOf(uid, spec));
      if (seen.size === specs.length) all.resolve();
    },
  });
  for (const [uid, spec] of specs.entries()) expect(plans.planOf(String(uid), spec).kind).toBe("reading");
  await all.promise;
  const [first, second, other] = ["0", "1", "2"].map((uid) => {
    const read = seen.get(uid);
    if (read?.kind !== "whole") throw new Error(`plan ${uid} is ${JSON.stringify(read)}`);
    return read.plan;
  });
  expect(first?.cut).not.toEqual(second?.cut);
  expect(second?.model).toBe(first?.model);
  expect(other?.model).not.toEqual(first?.model);
  await plans.close();
});
