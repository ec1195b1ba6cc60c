// Both worlds of the bench are what it takes them for: full, read back whole, and pods with a seat are bound to it and counted.
import { afterAll, describe, expect, test } from "vitest";
import { LABELS } from "../../controller/api/meta.ts";
import type { KubeObject, Resource } from "../../controller/kube/api/client.ts";
import { nodes, pods } from "../../controller/kube/api/resources.ts";
import { nodeFacts } from "../../controller/kube/inventory/node-facts.ts";
import { podFacts } from "../../controller/kube/inventory/pod-facts.ts";
import { whyNoControlPlane } from "../cluster/controlplane/binary.ts";
import { BED_TIMEOUT_MS } from "../cluster/kubelet/bed.ts";
import { until } from "../until.ts";
import { GPUS_EACH, NS } from "./cluster-objects.ts";
import { RealWorld } from "./cluster-real.ts";
import { SimWorld, type World } from "./cluster-world.ts";

const SEAT = "gpu-00001";
const why = whyNoControlPlane();

function seated(name: string): KubeObject {
  const term = { matchFields: [{ key: "metadata.name", operator: "In", values: [SEAT] }] };
  const resources = { limits: { "nvidia.com/gpu": String(GPUS_EACH) } };
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: { name, namespace: NS, labels: { [LABELS.group]: name } },
    spec: {
      containers: [{ name: "worker", image: "worker", resources }],
      affinity: { nodeAffinity: { requiredDuringSchedulingIgnoredDuringExecution: { nodeSelectorTerms: [term] } } },
    },
  };
}

async function all(world: World, resource: Resource): Promise<KubeObject[]> {
  const found: KubeObject[] = [];
  for await (const object of world.objects(resource)) found.push(object);
  return found;
}

const worlds = [
  { name: "memory", open: () => SimWorld.open(), skip: undefined },
  { name: "real", open: () => RealWorld.open(), skip: why },
];

describe.each(worlds)("the world of --server $name", ({ open, skip }) => {
  let world: World | undefined;
  afterAll(async () => {
    await world?.close();
  });

  test.skipIf(skip !== undefined)(
    `holds what it was filled with, and counts a pod that its scheduler has bound${skip ? ` (skipped: ${skip})` : ""}`,
    async () => {
      world = await open();
      await world.fill(8, 700); // more than a page
      const [filled, machines] = [await all(world, pods), await all(world, nodes)];
      expect(new Set(filled.map(({ metadata }) => metadata.name)).size).toBe(700);
      expect(filled.map(podFacts).every(({ node, gpus }) => node !== "" && gpus === 0)).toBe(true);
      expect(machines.map(nodeFacts)).toMatchObject(
        Array.from({ length: 8 }, () => ({ gpus: GPUS_EACH, taints: [], notReady: undefined })),
      );
      const { placedGpus } = world;
      await world.create(pods, seated("one"));
      await until(() => world?.placedGpus === placedGpus + GPUS_EACH, "the pod with a seat is bound");
      const bound = (await all(world, pods)).map(podFacts).find(({ name }) => name === "one");
      expect(bound?.node).toBe(SEAT);
    },
    BED_TIMEOUT_MS,
  );
});
