// The tables that `muster plan` prints for published configurations, as golden text to be read and reviewed.
// Regenerate: UPDATE_GOLDEN=1 npx vitest run test/controller/plan/print.test.ts
import { readFileSync, writeFileSync } from "node:fs";
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { parseInventory } from "../../../controller/plan/hardware.ts";
import { planShards } from "../../../controller/plan/plan.ts";
import { planJson, planText } from "../../../controller/plan/print.ts";
import { wishesOf } from "../../../controller/plan/wishes.ts";
import { fixtureUrl } from "./fixtures.ts";

const CASES = [
  ["llama-4-maverick", "8xH200"],
  ["llama-4-behemoth-projection", "16xH200"],
  ["llama-4-behemoth-projection", "8xH200"],
  ["deepseek-v3", "8xH200"],
  ["qwen3-235b-a22b", "4xH200"],
] as const;

const isUpdating = process.env.UPDATE_GOLDEN === "1";

async function asked(name: string, gpus: string) {
  const inventory = parseInventory(gpus);
  if (typeof inventory === "string") throw new Error(inventory);
  const spec = await readModel(fixtureUrl(name), { headersOnly: true });
  return { spec, inventory, wishes: wishesOf({ contextTokens: 32_768 }) };
}

for (const [name, gpus] of CASES) {
  test(`${name} on ${gpus} prints as reviewed`, async () => {
    const question = await asked(name, gpus);
    const text = planText(question, planShards(question.spec, question.inventory, question.wishes));
    const file = new URL(`golden/${name}-${gpus}.txt`, import.meta.url);
    if (isUpdating) writeFileSync(file, text);
    expect(text).toBe(readFileSync(file, "utf8"));
  });
}

test("the JSON form is small, round-trips and says the same", async () => {
  const question = await asked("llama-4-behemoth-projection", "8xH200");
  const planned = planShards(question.spec, question.inventory, question.wishes);
  const text = JSON.stringify(planJson(question, planned));
  expect(text.length).toBeLessThan(256 * 1024);
  expect(JSON.parse(text)).toMatchObject({
    kind: "infeasible",
    model: { projected: true },
    inventory: "8xH200",
    plan: null,
    reasons: [{ kind: "refused", code: "memory-short" }],
    remedy: { kind: "devices", inventory: "32xH200" },
  });
});
