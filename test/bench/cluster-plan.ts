// The largest model there is a config for (a projection), planned on every GPU of a cluster; headers are read before.
import { readModel } from "../../controller/model/model.ts";
import { deviceOf, gpuInventory } from "../../controller/plan/hardware.ts";
import { planShards } from "../../controller/plan/plan.ts";
import { wishesOf } from "../../controller/plan/wishes.ts";

const SOURCE = new URL("../fixtures/configs/llama-4-behemoth-projection", import.meta.url).href;

/** Answers what plans once and says how long that took, in ms. Throws where no plan is found. */
export async function behemothOnAll(nodes: number, each: number): Promise<() => number> {
  const model = await readModel(SOURCE, { headersOnly: true });
  const device = deviceOf("H200");
  if (device === undefined) throw new Error("the hardware table has no H200");
  const inventory = gpuInventory(device, nodes * each, each);
  const wishes = wishesOf({ contextTokens: 32_768 });
  return () => {
    const begunMs = performance.now();
    const planned = planShards(model, inventory, wishes);
    if (planned.kind !== "feasible") throw new Error(`no plan: ${planned.reasons[0]?.text}`);
    return performance.now() - begunMs;
  };
}
