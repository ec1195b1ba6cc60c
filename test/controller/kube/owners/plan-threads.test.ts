// Planning in threads: what they answer, and that a question that is given up takes nobody else's thread with it.
import { expect, test } from "vitest";
import { ownerOf } from "../../../../controller/kube/owners/deployment-objects.ts";
import { threadPlanner } from "../../../../controller/kube/owners/plan-threads.ts";
import { deviceOf, gpuInventory } from "../../../../controller/plan/hardware.ts";
import { type Ask, planQuestion } from "../../../../controller/reconcile/deployment/planning.ts";
import { fixtureUrl } from "../../plan/fixtures.ts";

const never = new AbortController().signal;

function askFor(source: string): Ask {
  const device = deviceOf("H200");
  if (device === undefined) throw new Error("no H200");
  const { wish } = ownerOf({
    apiVersion: "muster.dev/v1alpha1",
    kind: "ModelDeployment",
    metadata: { name: "chat", namespace: "models", uid: "u", generation: 1 },
    spec: { model: { source } },
  });
  if (wish.kind === "refused") throw new Error(wish.fault.detail);
  const all = gpuInventory(device, 16);
  // Read as it is sent, as those of a cluster are.
  const grounds = {
    get free() {
      return all;
    },
    all,
  };
  return { question: wish.value.question, grounds, calibration: undefined };
}

test("one after the other, and two at once: each has the answer to its own question", async () => {
  const asks = ["llama-4-maverick", "llama-4-scout", "qwen3-235b-a22b"].map((name) => askFor(fixtureUrl(name)));
  const wanted = await Promise.all(asks.map((ask) => planQuestion(ask)));
  expect(new Set(wanted.map((each) => each.kind))).toEqual(new Set(["feasible"]));
  for (const [index, ask] of asks.entries()) expect(await threadPlanner(ask, never)).toEqual(wanted[index]);
  expect(await Promise.all(asks.map((ask) => threadPlanner(ask, never)))).toEqual(wanted);
});

test("one that is given up rejects with the reason, and the next is answered", async () => {
  const ask = askFor(fixtureUrl("llama-4-scout"));
  const stop = new AbortController();
  const given = threadPlanner(ask, stop.signal);
  stop.abort(new Error("too late"));
  await expect(given).rejects.toThrow("too late");
  await expect(threadPlanner(ask, stop.signal)).rejects.toThrow("too late");
  expect((await threadPlanner(ask, never)).kind).toBe("feasible");
});
