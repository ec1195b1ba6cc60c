// The largest model there is a config for (a projection), planned on every GPU of a cluster; headers are read before.
import { readModel } from "../../controller/model/model.ts";
import { deviceOf, gpuInventory } from "../../controller/plan/hardware.ts";
import { planShards } from "../../controller/plan/plan.ts";
import { wishesOf } from "../../controller/plan/wishes.ts";

const SOURCE = new URL("../fixtures/configs/llama-4-behemoth-projection", import.meta.url).href;

export type Planning = { wallMs: number; cpuMs: number };

/** Answers what plans once and says how long that took. Throws where no plan is found. */
export async function behemothOnAll(nodes: number, each: number): Promise<() => Planning> {
  const model = await readModel(SOURCE, { headersOnly: true });
  const device = deviceOf("H200");
  if (device === undefined) throw new Error("the hardware table has no H200");
  const inventory = gpuInventory(device, nodes * each, each);
  const wishes = wishesOf({ contextTokens: 32_768 });
  return () => {
    const begunMs = performance.now();
    const begun = process.cpuUsage();
    const planned = planShards(model, inventory, wishes);
    if (planned.kind !== "feasible") throw new Error(`no plan: ${planned.reasons[0]?.text}`);
    const { user, system } = process.cpuUsage(begun);
    return { wallMs: performance.now() - begunMs, cpuMs: (user + system) / 1000 };
  };
}
