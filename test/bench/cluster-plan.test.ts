// The planner on a whole large cluster stays far from a person's patience, also on a machine that does other things meanwhile.
import { expect, test } from "vitest";
import { behemothOnAll } from "./cluster-plan.ts";

/** Asked for is one second on a machine of its own: `npm run bench -- cluster` measures that. This bound only keeps it from growing with the square. */
const MS_MAX = 20_000;

test("the largest model is planned on 40,000 free GPUs", async () => {
  const planOnce = await behemothOnAll(5_000, 8);
  expect(Math.min(planOnce(), planOnce(), planOnce())).toBeLessThan(MS_MAX);
});
