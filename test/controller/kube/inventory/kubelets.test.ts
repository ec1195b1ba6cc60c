// Whether all kubelets of GPU nodes know certificates of pods.
import { expect, test } from "vitest";
import { Kubelets } from "../../../../controller/kube/inventory/kubelets.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";

let version = 1;
const node = (name: string, kubeletVersion: string | undefined, gpus = 8) => {
  version += 1;
  return {
    apiVersion: "v1",
    kind: "Node",
    metadata: { name, uid: `uid-${name}`, resourceVersion: String(version) },
    status: {
      allocatable: { "nvidia.com/gpu": String(gpus) },
      ...(kubeletVersion === undefined ? {} : { nodeInfo: { kubeletVersion } }),
    },
  };
};

test("one older kubelet under GPUs is enough, until it is newer or gone; nodes without GPUs do not count", () => {
  const nodes = new Store();
  nodes.replace([node("a", "v1.37.2"), node("b", "v1.36.9"), node("plain", "v1.30.0", 0)], "1");
  const kubelets = new Kubelets(nodes);
  expect(kubelets.areCurrent).toBe(false);
  nodes.put(node("b", "v1.38.0+k3s1"));
  expect(kubelets.areCurrent).toBe(true);
  for (const silent of [undefined, "", "v0.40.1", "1.37"]) {
    nodes.put(node("c", silent));
    expect(kubelets.areCurrent, silent).toBe(false);
    nodes.put(node("c", "v2.0.0"));
    expect(kubelets.areCurrent).toBe(true);
  }
  nodes.put(node("d", "v1.9.0"));
  expect(kubelets.areCurrent).toBe(false);
  nodes.replace([node("a", "v1.37.2")], String(version + 1));
  expect(kubelets.areCurrent).toBe(true);
});
