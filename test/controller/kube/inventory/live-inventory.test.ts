// The inventory that is kept up to date says what one that is made anew would, after every change.
import fc from "fast-check";
import { expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { inventoryOf, plannable } from "../../../../controller/kube/inventory/inventory.ts";
import { LiveInventory } from "../../../../controller/kube/inventory/live-inventory.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { H200, node, pod } from "../objects.ts";

type Change = { what: "node" | "pod" | "slice"; id: number; kind: number; gpus: number; at: number };

const changes = fc.array(
  fc.record({
    what: fc.constantFrom<Change["what"]>("node", "pod", "pod", "slice"),
    id: fc.nat({ max: 5 }),
    kind: fc.nat({ max: 5 }),
    gpus: fc.nat({ max: 8 }),
    at: fc.nat({ max: 3 }),
  }),
  { minLength: 1, maxLength: 60 },
);

function objectOf({ what, id, kind, gpus, at }: Change): KubeObject {
  const labels = kind === 1 ? {} : kind === 2 ? { ...H200, "nvidia.com/gpu.count": "9" } : H200;
  if (what === "node") return node(`n${id}`, { gpus: kind === 4 ? 0 : 8, labels, unschedulable: kind === 3 });
  const spec = { driver: kind === 1 ? "other" : "gpu.nvidia.com", nodeName: `n${at}`, devices: [{ name: "gpu-0" }] };
  if (what === "slice")
    return { apiVersion: "resource.k8s.io/v1", kind: "ResourceSlice", metadata: { name: `s${id}` }, spec };
  const made = pod(`p${id}`, { gpus, ...(kind === 1 ? {} : { node: `n${at}` }) });
  return kind === 2 ? { ...made, status: { phase: "Succeeded" } } : made;
}

test("after every change it is what an inventory of the same objects is, and what has not changed is the same object", () => {
  fc.assert(
    fc.property(changes, (history) => {
      const stores = { nodes: new Store(), pods: new Store(), slices: new Store() };
      const live = new LiveInventory(stores);
      const told = new Set<string>();
      live.subscribe((name) => told.add(name));
      for (const [index, change] of history.entries()) {
        const before = new Map(live.of().nodes.map((each) => [each.name, each]));
        told.clear();
        const made = objectOf(change);
        const version = String(index + 1);
        const object = { ...made, metadata: { ...made.metadata, uid: made.metadata.name, resourceVersion: version } };
        const store = stores[`${change.what}s`];
        if (change.kind === 5) store.remove(object);
        else store.put(object);
        const objects = {
          nodes: [...stores.nodes.all()],
          pods: [...stores.pods.all()],
          slices: [...stores.slices.all()],
        };
        for (const product of [undefined, "H100"]) {
          const wanted = inventoryOf(objects, product);
          expect(live.of(product)).toEqual(wanted);
          for (const count of ["free", "all"] as const)
            expect(live.plannable({}, count, product)).toEqual(plannable(wanted, {}, count));
        }
        for (const each of live.of().nodes) {
          expect(live.nodeOf(each.name)).toBe(each);
          if (!told.has(each.name)) expect(before.get(each.name), `${each.name} was not told`).toBe(each);
        }
      }
    }),
    { numRuns: 300 },
  );
});
