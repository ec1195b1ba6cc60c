import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { inventoryOf, plannable, productOf, whyNot } from "../../../../controller/kube/inventory/inventory.ts";
import { inventoryName } from "../../../../controller/plan/hardware.ts";
import { H200, node, type PodWish, pod, slice } from "../objects.ts";

const view = (nodes: KubeObject[], pods: KubeObject[] = [], slices: KubeObject[] = [], product?: string) =>
  inventoryOf({ nodes, pods, slices }, product);
const free = (...pods: KubeObject[]) => view([node("a")], pods).nodes[0]?.free;

describe("what pods hold", () => {
  test("V1: every pod that is not over counts, whoever's it is", () => {
    expect(free()).toBe(8);
    expect(free(pod("x", { gpus: 3, node: "a" }), pod("y", { gpus: 2, node: "a", phase: "Pending" }))).toBe(3);
    expect(
      free(pod("x", { gpus: 3, node: "a", phase: "Succeeded" }), pod("y", { gpus: 2, node: "a", phase: "Failed" })),
    ).toBe(8);
    expect(free(pod("x", { gpus: 3, node: "a", leaving: true }))).toBe(5);
    expect(free(pod("x", { gpus: 3 }), pod("y", { gpus: 3, node: "b" }), pod("z", { node: "a" }))).toBe(8);
    expect(free(pod("x", { gpus: 3, nominated: "a" }))).toBe(5);
  });

  test("limits alone are requests; init containers and sidecars count as the scheduler counts them", () => {
    expect(free(pod("x", { gpus: 4, node: "a", limitsOnly: true }))).toBe(4);
    expect(free(pod("x", { gpus: 2, node: "a", init: [{ gpus: 6 }] }))).toBe(2);
    expect(free(pod("x", { gpus: 2, node: "a", init: [{ gpus: 1, sidecar: true }, { gpus: 3 }] }))).toBe(4);
    expect(
      free(
        pod("x", {
          gpus: 4,
          node: "a",
          init: [
            { gpus: 1, sidecar: true },
            { gpus: 1, sidecar: true },
          ],
        }),
      ),
    ).toBe(2);
  });

  test("V1: more held than there is leaves nothing, not less", () => {
    expect(view([node("a", { gpus: 2 })], [pod("x", { gpus: 5, node: "a" })]).nodes[0]).toMatchObject({
      held: 5,
      free: 0,
    });
  });
});

describe("nodes that cannot be used are named with their reason", () => {
  const refusal = (object: KubeObject, ...slices: KubeObject[]) => view([object], [], slices).refused[0];

  test("MIG, both strategies", () => {
    const single = {
      ...H200,
      "nvidia.com/gpu.product": "NVIDIA-H200-MIG-1g.18gb",
      "nvidia.com/mig.strategy": "single",
    };
    expect(refusal(node("m", { labels: single }))).toMatchObject({ name: "m", code: "mig" });
    const mixed = refusal(node("m", { gpus: 0, resources: { "nvidia.com/mig-3g.71gb": "16" } }));
    expect(mixed?.text).toBe(
      "its GPUs are cut by MIG (nvidia.com/mig-3g.71gb, mig.strategy unknown); ranks need whole GPUs",
    );
  });

  test("V2: refused nodes are told to people, once for each reason, by name and with the number of the rest", () => {
    const resources = { "nvidia.com/mig-3g.71gb": "16" };
    const cut = ["a", "b", "c", "d", "e", "f"].map((name) => node(name, { gpus: 0, resources }));
    const shared = node("s", { labels: { ...H200, "nvidia.com/gpu.replicas": "4" } });
    const dra = node("z", { gpus: 0 });
    const { needs } = view([...cut, shared, dra], [], [slice("z")]);
    expect(needs.map(({ code, text }) => [code, text.replace(/: its GPUs.*/, "")])).toEqual([
      ["mig", "not used: nodes a, b, c, d and 2 more"],
      ["shared", "not used: node s"],
      ["dra-only", "not used: node z"],
    ]);
  });

  test("the label mig.strategy of a node whose GPUs are whole refuses nothing", () => {
    const seen = view([
      node("m", {
        labels: { ...H200, "nvidia.com/mig.strategy": "single" },
        resources: { "nvidia.com/mig-1g.18gb": "0" },
      }),
    ]);
    expect(seen.refused).toEqual([]);
    expect(seen.nodes[0]?.free).toBe(8);
  });

  test("time slicing and MPS", () => {
    const sliced = refusal(node("t", { labels: { ...H200, "nvidia.com/gpu.replicas": "4" } }));
    expect(sliced).toEqual({
      name: "t",
      code: "shared",
      text: "its GPUs are shared between pods (gpu.replicas is 4); ranks need GPUs of their own",
    });
    expect(refusal(node("t", { labels: { ...H200, "nvidia.com/gpu.product": "NVIDIA-H200-SHARED" } }))?.code).toBe(
      "shared",
    );
    expect(refusal(node("t", { labels: { ...H200, "nvidia.com/gpu.sharing-strategy": "mps" } }))?.code).toBe("shared");
    expect(refusal(node("t", { gpus: 0, resources: { "nvidia.com/gpu.shared": "32" } }))?.code).toBe("shared");
    expect(
      refusal(
        node("t", { labels: { ...H200, "nvidia.com/gpu.replicas": "1", "nvidia.com/gpu.sharing-strategy": "none" } }),
      ),
    ).toBeUndefined();
  });

  test("GPUs that only DRA offers", () => {
    expect(refusal(node("d", { gpus: 0 }), slice("d"))?.code).toBe("dra-only");
    expect(refusal(node("d", { gpus: 0 }), slice("d", 8, "net.example.com"))).toBeUndefined();
    expect(refusal(node("d", { gpus: 0 }), slice("d", 0))).toBeUndefined();
    expect(view([node("d")], [], [slice("d")]).nodes[0]?.free).toBe(8);
  });

  test("cordoned and not ready: what runs there goes on, nothing new comes", () => {
    const seen = view([node("c", { unschedulable: true }), node("n", { ready: false })]);
    expect(seen.nodes.map(({ closed }) => closed)).toEqual([
      { code: "cordoned", text: "it is cordoned" },
      { code: "not-ready", text: "Kubelet stopped posting node status." },
    ]);
    expect(plannable(seen, {}, "all").nodes).toEqual([]);
  });
});

describe("labels", () => {
  test("products of GPU feature discovery, by the board and not by the chip alone", () => {
    const names = {
      "NVIDIA-H100-80GB-HBM3": "H100",
      "NVIDIA-H200": "H200",
      "NVIDIA-H800": "H800",
      "NVIDIA-A100-SXM4-80GB": "A100-80",
      "NVIDIA-L40S": "L40S",
      "NVIDIA-B200": "B200",
      "NVIDIA-GB200": "GB200",
      h200: "H200",
      "NVIDIA-H100-PCIe": undefined,
      "NVIDIA-H100-NVL": undefined,
      "NVIDIA-A100-SXM4-40GB": undefined,
      "NVIDIA-A100-80GB-PCIe": undefined,
      "Tesla-T4": undefined,
    };
    for (const [label, product] of Object.entries(names)) expect(productOf(label), label).toBe(product);
  });

  test("memory is the label's or the table's, whichever is less", () => {
    const bytes = (memory: string) =>
      view([node("a", { labels: { ...H200, "nvidia.com/gpu.memory": memory } })]).nodes[0]?.device.memoryBytes;
    expect(bytes("143771")).toBe(141e9);
    expect(bytes("100000")).toBe(100_000 * 1024 * 1024);
    expect(bytes("odd")).toBe(141e9);
  });

  test("without labels it asks once for all nodes, and takes a said product", () => {
    const bare = ["a", "b", "c"].map((name) => node(name, { labels: {} }));
    const asked = view(bare);
    expect(asked.nodes).toEqual([]);
    expect(asked.refused.map(({ code }) => code)).toEqual(["no-labels", "no-labels", "no-labels"]);
    expect(asked.needs).toEqual([
      {
        code: "gpu-labels",
        nodes: ["a", "b", "c"],
        text: "3 nodes offer GPUs without saying which: run GPU feature discovery, or write spec.gpu.product",
      },
    ]);
    const told = view(bare, [], [], "H100");
    expect(told.needs).toEqual([]);
    expect(inventoryName(plannable(told, {}, "all"))).toBe("24xH100");
  });

  test("an unknown product of known memory is used, and said to be predicted roughly", () => {
    const labels = { "nvidia.com/gpu.product": "NVIDIA-H100-NVL", "nvidia.com/gpu.memory": "95830" };
    const seen = view([node("a", { labels })]);
    expect(seen.nodes[0]?.device).toMatchObject({ product: "NVIDIA-H100-NVL", memoryBytes: 95_830 * 1024 * 1024 });
    expect(seen.needs[0]).toMatchObject({ code: "unknown-product", nodes: ["a"] });
    expect(whyNot(seen.nodes[0] ?? never(), { product: "NVIDIA-H100-NVL" })).toBeUndefined();
    expect(whyNot(seen.nodes[0] ?? never(), { product: "H100" })).toBe("its GPUs are NVIDIA-H100-NVL");
  });

  test("cards that are not offered are said", () => {
    const seen = view([node("a", { gpus: 6, labels: { ...H200, "nvidia.com/gpu.count": "8" } })]);
    expect(seen.nodes[0]?.allocatable).toBe(6);
    expect(seen.needs[0]?.code).toBe("unhealthy-gpus");
  });

  test("the link domain is the clique where there is one, else the node", () => {
    const labels = { ...H200, "nvidia.com/gpu.clique": "f1.0", "topology.kubernetes.io/zone": "z1" };
    const seen = view([node("a", { labels }), node("b")]);
    expect(seen.nodes.map(({ domain, zone }) => [domain, zone])).toEqual([
      ["f1.0", "z1"],
      ["b", undefined],
    ]);
  });
});

function never(): never {
  throw new Error("no node");
}

describe("what the planner may count on", () => {
  const tainted = node("t", { taints: [{ key: "team", value: "red", effect: "NoSchedule" }] });
  const gpuTaint = node("g", { taints: [{ key: "nvidia.com/gpu", value: "present", effect: "NoSchedule" }] });

  test("nodes that the model's volume does not reach are left out, and say so", () => {
    const seen = view([node("a"), node("b")]);
    const values = ["b"];
    const volume = [{ labels: [{ key: "kubernetes.io/hostname", operator: "In", values }], fields: [] }];
    expect(plannable(seen, { volume }, "all").nodes.map(({ name }) => name)).toEqual(["b"]);
    expect(plannable(seen, { volume: [] }, "all").nodes).toHaveLength(2);
    expect(whyNot(seen.nodes[0] ?? never(), { volume })).toBe("the model's volume cannot be mounted there");
  });

  test("taints: the GPU taint is ours, others need a toleration, PreferNoSchedule keeps nobody away", () => {
    const soft = node("s", { taints: [{ key: "old", effect: "PreferNoSchedule" }] });
    const seen = view([tainted, gpuTaint, soft]);
    const names = (selection: Parameters<typeof plannable>[1]) =>
      plannable(seen, selection, "all").nodes.map(({ name }) => name);
    expect(names({})).toEqual(["g", "s"]);
    expect(names({ tolerations: [{ key: "team", value: "red" }] })).toEqual(["g", "s", "t"]);
    expect(names({ tolerations: [{ key: "team", operator: "Exists" }] })).toEqual(["g", "s", "t"]);
    expect(names({ tolerations: [{ operator: "Exists" }] })).toEqual(["g", "s", "t"]);
    expect(names({ tolerations: [{ key: "team", value: "blue" }] })).toEqual(["g", "s"]);
    expect(names({ tolerations: [{ key: "team", value: "red", effect: "NoExecute" }] })).toEqual(["g", "s"]);
    expect(whyNot(seen.nodes[2] ?? never(), {})).toBe("the taint team=red:NoSchedule is not tolerated");
  });

  test("product and node selector choose; free counts what is left", () => {
    const labels = { ...H200, pool: "x" };
    const seen = view(
      [node("a", { labels }), node("b"), node("c", { labels: { "nvidia.com/gpu.product": "NVIDIA-L40S" } })],
      [pod("p", { gpus: 5, node: "a" }), pod("q", { gpus: 8, node: "b" })],
    );
    expect(inventoryName(plannable(seen, { product: "H200" }, "all"))).toBe("16xH200");
    expect(inventoryName(plannable(seen, { product: "nvidia-h200" }, "all"))).toBe("16xH200");
    expect(inventoryName(plannable(seen, { product: "NVIDIA-H200" }, "free"))).toBe("3xH200");
    expect(plannable(seen, { nodeSelector: { pool: "x" } }, "free").nodes.map(({ name }) => name)).toEqual(["a"]);
  });
});

// ---- properties ----

const podWishes: fc.Arbitrary<PodWish> = fc.record({
  gpus: fc.nat({ max: 9 }),
  node: fc.constantFrom("a", "b", "c", "gone", ""),
  phase: fc.constantFrom("Pending", "Running", "Succeeded", "Failed", "Unknown"),
  leaving: fc.boolean(),
  limitsOnly: fc.boolean(),
});

test("V1, V3: free + held covers every pod, in whatever order things come", () => {
  fc.assert(
    fc.property(fc.array(podWishes, { maxLength: 30 }), fc.integer(), (wishes, seed) => {
      const pods = wishes.map((wish, index) => pod(`p${index}`, wish));
      const nodes = ["c", "a", "b"].map((name) => node(name));
      const seen = view(nodes, pods);
      expect(seen.nodes.map(({ name }) => name)).toEqual(["a", "b", "c"]);
      for (const each of seen.nodes) {
        const held = wishes
          .filter((wish) => wish.node === each.name && wish.phase !== "Succeeded" && wish.phase !== "Failed")
          .reduce((sum, wish) => sum + (wish.gpus ?? 0), 0);
        expect(each.held).toBe(held);
        expect(each.free).toBe(Math.max(0, each.allocatable - held));
      }
      const turned = pods
        .toSorted((one, other) => ((one.metadata.name.length * seed) % 7) - ((other.metadata.name.length * seed) % 7))
        .reverse();
      expect(view(nodes.toReversed(), turned)).toEqual(seen);
    }),
    { numRuns: 500 },
  );
});

test("odd objects are read as far as they go, and stop nothing", () => {
  const odd = fc.anything({ maxDepth: 3 });
  fc.assert(
    fc.property(odd, odd, odd, (spec, status, more) => {
      const strange = { apiVersion: "v1", kind: "Node", metadata: { name: "odd" }, spec, status };
      const seen = view([strange, node("a")], [{ ...strange, spec: more }], [{ ...strange, spec: more }]);
      expect(seen.nodes.find(({ name }) => name === "a")?.free).toBe(8);
    }),
    { numRuns: 500 },
  );
});

test("5,000 nodes and 100,000 pods are read within seconds, and again within a tenth of that", () => {
  const nodes = Array.from({ length: 5000 }, (_, index) => node(`gpu-${index}`));
  const pods = Array.from({ length: 100_000 }, (_, index) =>
    pod(`p${index}`, { gpus: index % 3, node: `gpu-${index % 5000}` }),
  );
  const begin = performance.now();
  const first = view(nodes, pods);
  const middle = performance.now();
  const second = view(nodes, pods);
  const end = performance.now();
  console.log(
    `inventory of 5,000 nodes, 100,000 pods: first ${(middle - begin).toFixed(0)} ms, again ${(end - middle).toFixed(0)} ms`,
  );
  expect(second).toEqual(first);
  expect(middle - begin).toBeLessThan(5000);
});
