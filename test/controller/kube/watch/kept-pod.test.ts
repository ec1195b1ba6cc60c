// What the store of pods keeps: everything that is read of a pod, and of strangers nothing else.
import { expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { inventoryOf } from "../../../../controller/kube/inventory/inventory.ts";
import { podFacts } from "../../../../controller/kube/inventory/pod-facts.ts";
import { keptPod } from "../../../../controller/kube/watch/kept-pod.ts";
import { node, pod } from "../objects.ts";

const PODS: readonly KubeObject[] = [
  pod("plain", { node: "n" }),
  pod("gpus", { gpus: 2, node: "n" }),
  pod("limits", { gpus: 1, node: "n", limitsOnly: true }),
  pod("ended", { gpus: 4, node: "n", phase: "Succeeded" }),
  pod("leaving", { gpus: 1, node: "n", leaving: true }),
  pod("nominated", { gpus: 1, nominated: "n" }),
  pod("inits", { gpus: 1, node: "n", init: [{ gpus: 1, sidecar: true }, { gpus: 2 }] }),
];

test("of a stranger the same GPUs are read as before, on every node", () => {
  const nodes = [node("n", { gpus: 8 })];
  expect(inventoryOf({ nodes, pods: PODS.map(keptPod), slices: [] })).toEqual(
    inventoryOf({ nodes, pods: PODS, slices: [] }),
  );
  for (const each of PODS) {
    const { gpus, isLeaving, name, namespace, uid, resourceVersion } = podFacts(each);
    expect(podFacts(keptPod(each))).toMatchObject({ gpus, isLeaving, name, namespace, uid, resourceVersion });
  }
});

test("a stranger that asks for no GPU is its name and version, whatever it was", () => {
  expect(Object.keys(keptPod(pod("web", { node: "n" }))).toSorted()).toEqual(["apiVersion", "kind", "metadata"]);
});

test("a pod of ours stays whole, without managedFields", () => {
  const ours = pod("w", { gpus: 8 });
  const labels = { "muster.dev/group": "g" };
  const metadata = { ...ours.metadata, labels, ...{ managedFields: [{ manager: "kubelet" }] } };
  expect(keptPod({ ...ours, metadata })).toEqual({ ...ours, metadata: { ...ours.metadata, labels } });
});
