import { beforeAll, describe, expect, test } from "vitest";
import { type DraftPoolSpec, draftPoolSpec } from "../../../controller/api/draft-pool.ts";
import {
  deploymentWish,
  draftOptions,
  formatFault,
  kvBytesOf,
  NOT_YET,
  poolToken,
  poolWish,
  sloNotices,
  speculationOptions,
} from "../../../controller/api/mapping.ts";
import { type ModelDeploymentSpec, modelDeploymentSpec } from "../../../controller/api/model-deployment.ts";
import { toStructural } from "../../../controller/api/structural.ts";
import { readModel } from "../../../controller/model/model.ts";
import { cpuInventory } from "../../../controller/plan/hardware.ts";
import { planShards } from "../../../controller/plan/plan.ts";
import { wishesOf } from "../../../controller/plan/wishes.ts";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import { fieldPaths } from "./leaves.ts";
import { minimalDeployment } from "./objects.ts";

type Spec = Record<string, unknown>;
const HF = "hf://org/name";
const deployment = (spec: Spec = {}): ModelDeploymentSpec => modelDeploymentSpec.parse(minimalDeployment(spec).spec);
const pool = (spec: Spec = {}): DraftPoolSpec => draftPoolSpec.parse({ model: { source: HF }, ...spec });

const hf = (more: Spec) => ({ model: { source: HF, ...more } });
const auto = (more: Spec, targets: Spec = { queue: 1 }) => ({ autoscale: { max: 4, targets, ...more } });
const nodes = (more: Spec) => ({ gpu: { topology: more } });
const taint = (more: Spec) => ({ gpu: { tolerations: [{ key: "a", value: "x", ...more }] } });
const patch = (podPatch: Spec) => ({ podPatch });
const patchedTaint = (more: Spec) => patch({ tolerations: [{ key: "a", value: "x", ...more }] });
const variable = (name: string, value: string) => patch({ env: [{ name, value }] });

/** For every field: two specs that differ in nothing else. A field that is missing here fails the first test. */
const FIELDS: Record<string, [Spec, Spec]> = {
  "model.source": [hf({}), { model: { source: "hf://org/other" } }],
  "model.revision": [hf({}), hf({ revision: "v1" })],
  "model.auth.secretName": [hf({ auth: { secretName: "a" } }), hf({ auth: { secretName: "b" } })],
  "model.auth.key": [hf({ auth: { secretName: "a" } }), hf({ auth: { secretName: "a", key: "k" } })],
  "format.container": [{}, { format: { container: "gguf" } }],
  "format.quantisation": [{}, { format: { quantisation: "Q8_0" } }],
  "parallelism.tp": [{}, { parallelism: { tp: 2 } }],
  "parallelism.dp": [{}, { parallelism: { dp: 2 } }],
  "parallelism.ep": [{}, { parallelism: { ep: 2 } }],
  "parallelism.etp": [{}, { parallelism: { etp: 2 } }],
  "parallelism.pp": [{}, { parallelism: { pp: 2 } }],
  replicas: [{}, { replicas: 2 }],
  "autoscale.min": [auto({}), auto({ min: 0 })],
  "autoscale.max": [auto({}), auto({ max: 5 })],
  "autoscale.targets.queue": [auto({}), auto({}, { queue: 2 })],
  "autoscale.targets.ttftMs": [auto({}), auto({}, { queue: 1, ttftMs: 100 })],
  "autoscale.targets.itlMs": [auto({}), auto({}, { queue: 1, itlMs: 10 })],
  "slo.ttftMs": [{}, { slo: { ttftMs: 100 } }],
  "slo.itlMs": [{}, { slo: { itlMs: 10 } }],
  "slo.contextTokens": [{}, { slo: { contextTokens: 4096 } }],
  "slo.concurrency": [{}, { slo: { concurrency: 17 } }],
  "kvCache.dtype": [{}, { kvCache: { dtype: "fp8" } }],
  "kvCache.fraction": [{}, { kvCache: { fraction: 0.5 } }],
  "kvCache.offload.hostMemory": [{}, { kvCache: { offload: { hostMemory: "1Gi" } } }],
  "experts.redundant": [{ experts: { balancing: "measured" } }, { experts: { redundant: 1, balancing: "measured" } }],
  "experts.balancing": [{}, { experts: { balancing: "measured" } }],
  "speculation.draftPool": [{}, { speculation: { draftPool: "drafts" } }],
  "speculation.method": [{}, { speculation: { method: "lookup" } }],
  "speculation.lossless": [{}, { speculation: { lossless: "L2" } }],
  "gpu.product": [{}, { gpu: { product: "H100" } }],
  "gpu.count": [{}, { gpu: { count: 4 } }],
  "gpu.nodeSelector": [{}, { gpu: { nodeSelector: { a: "b" } } }],
  "gpu.tolerations[].key": [taint({}), taint({ key: "b" })],
  "gpu.tolerations[].operator": [
    { gpu: { tolerations: [{ key: "a" }] } },
    { gpu: { tolerations: [{ key: "a", operator: "Exists" }] } },
  ],
  "gpu.tolerations[].value": [taint({}), taint({ value: "y" })],
  "gpu.tolerations[].effect": [taint({}), taint({ effect: "NoExecute" })],
  "gpu.tolerations[].tolerationSeconds": [taint({}), taint({ tolerationSeconds: 3 })],
  "gpu.topology.nodes": [nodes({}), nodes({ nodes: 2 })],
  "gpu.topology.within": [nodes({}), nodes({ within: "nvlink" })],
  "rollout.kind": [{}, { rollout: { kind: "inPlace" } }],
  "rollout.drainTimeout": [{}, { rollout: { drainTimeout: "1m30s" } }],
  priority: [{}, { priority: 1 }],
  "podPatch.labels": [patch({}), patch({ labels: { a: "b" } })],
  "podPatch.annotations": [patch({}), patch({ annotations: { a: "b" } })],
  "podPatch.queueLabels": [patch({}), patch({ queueLabels: { "kueue.x-k8s.io/queue-name": "q" } })],
  "podPatch.env[].name": [variable("A", "1"), variable("B", "1")],
  "podPatch.env[].value": [variable("A", "1"), variable("A", "2")],
  "podPatch.resources.requests": [patch({}), patch({ resources: { requests: { cpu: 1 } } })],
  "podPatch.resources.limits": [patch({}), patch({ resources: { limits: { cpu: 1 } } })],
  "podPatch.tolerations[].key": [patchedTaint({}), patchedTaint({ key: "b" })],
  "podPatch.tolerations[].operator": [
    patch({ tolerations: [{ key: "a" }] }),
    patch({ tolerations: [{ key: "a", operator: "Exists" }] }),
  ],
  "podPatch.tolerations[].value": [patchedTaint({}), patchedTaint({ value: "y" })],
  "podPatch.tolerations[].effect": [patchedTaint({}), patchedTaint({ effect: "NoExecute" })],
  "podPatch.tolerations[].tolerationSeconds": [patchedTaint({}), patchedTaint({ tolerationSeconds: 3 })],
  "podPatch.priorityClassName": [patch({}), patch({ priorityClassName: "high" })],
  "podPatch.imagePullSecrets[].name": [
    patch({ imagePullSecrets: [{ name: "a" }] }),
    patch({ imagePullSecrets: [{ name: "b" }] }),
  ],
  "podPatch.hostCache.path": [patch({ hostCache: {} }), patch({ hostCache: { path: "/var/cache/muster/x" } })],
  "podPatch.ipcLock": [patch({}), patch({ ipcLock: true })],
};

const isNamed = (field: string, path: string) => field === `spec.${path}` || `spec.${path}`.startsWith(`${field}.`);

describe("no field of a ModelDeployment is ignored silently", () => {
  const paths = fieldPaths(toStructural(modelDeploymentSpec));

  test("every field is looked at here", () => {
    expect(Object.keys(FIELDS).toSorted()).toEqual(paths.toSorted());
  });

  test.each(Object.entries(FIELDS))(
    "%s changes what is asked, or is said to have no effect yet",
    (path, [one, other]) => {
      const [before, after] = [deploymentWish(deployment(one)), deploymentWish(deployment(other))];
      const isSaid = after.notYet.some(({ field }) => isNamed(field, path));
      const asked = { ...before, notYet: [] };
      if (isSaid) expect({ ...after, notYet: [] }).toEqual(asked);
      else expect({ ...after, notYet: [] }).not.toEqual(asked);
    },
  );

  test("what has no effect is a field that is there, with a reason, and is said only where it is asked", () => {
    expect(deploymentWish(deployment()).notYet).toEqual([]);
    for (const { field, message } of NOT_YET) {
      expect(
        paths.some((path) => isNamed(field, path)),
        field,
      ).toBe(true);
      expect(message.length).toBeGreaterThan(20);
    }
    const asked = Object.values(FIELDS).flatMap(([, spec]) => deploymentWish(deployment(spec)).notYet);
    expect(new Set(asked.map(({ field }) => field))).toEqual(new Set(NOT_YET.map(({ field }) => field)));
  });
});

describe("from fields to what the planner is asked", () => {
  let model: ModelSpec;
  beforeAll(async () => {
    model = await readModel("builtin://nano-maverick");
  }, 60_000);

  test("pins, ranks and nodes are the cut that is planned", () => {
    const spec = deployment({
      parallelism: { tp: 4, ep: 2, etp: 2 },
      gpu: { count: 4, topology: { nodes: 2 } },
      slo: { contextTokens: 512, concurrency: 8 },
    });
    const { plan } = deploymentWish(spec);
    const planned = planShards(model, cpuInventory(2), wishesOf(plan));
    expect(planned.kind === "feasible" && planned.plan).toMatchObject({
      cut: { world: 4, tp: 4, dp: 1, ep: 2, etp: 2, pp: 1 },
      workers: 2,
      contextTokens: 512,
    });
  });

  test("a pin that cannot be is refused by the planner, not overridden", () => {
    const { plan } = deploymentWish(deployment({ parallelism: { tp: 4, dp: 2 } }));
    const planned = planShards(model, cpuInventory(1), wishesOf(plan));
    expect(planned.kind).toBe("infeasible");
  });

  test("a fraction of memory is KV bytes of each rank", () => {
    const { plan, kvFraction } = deploymentWish(deployment({ kvCache: { fraction: 0.25 } }));
    const kvBytes = kvBytesOf(kvFraction, 64e6);
    expect(kvBytes).toBe(16e6);
    const planned = planShards(model, cpuInventory(1), wishesOf({ ...plan, kvBytes }));
    const all = planShards(model, cpuInventory(1), wishesOf({ ...plan, kvBytes: kvBytesOf(0.5, 64e6) }));
    const blocks = [planned, all].map((one) => (one.kind === "feasible" ? one.plan.kvBlocks : 0));
    expect(blocks[1]).toBeGreaterThan(blocks[0] ?? 0);
    expect(kvBytesOf(undefined, 64e6)).toBeUndefined();
  });

  test("steps have room for every sequence that may run", () => {
    const { engine, limits } = deploymentWish(deployment({ slo: { concurrency: 300 } }));
    expect(engine.rowsMax).toBe(300);
    expect(engine.slotsMax).toBeGreaterThan(600);
    expect(limits.runningMax).toBe(300);
  });

  test.each([
    [{ source: HF, revision: "v1.0" }, "hf://org/name@v1.0"],
    [{ source: "hf://org/name/file.gguf", revision: "v1" }, "hf://org/name@v1/file.gguf"],
    [{ source: "hf://org/name@main/file.gguf" }, "hf://org/name@main/file.gguf"],
    [{ source: "file:///models/x" }, "file:///models/x"],
  ])("%j is read from %s", (wish, url) => {
    expect(deploymentWish(deployment({ model: wish })).source.url).toBe(url);
  });

  test("autoscale takes over from replicas", () => {
    expect(deploymentWish(deployment({ replicas: 3 })).scale).toEqual({ kind: "fixed", replicas: 3 });
    expect(deploymentWish(deployment({ replicas: 3, ...auto({ min: 0 }) })).scale).toEqual({
      kind: "auto",
      min: 0,
      max: 4,
      targets: { queue: 1 },
    });
  });

  test.each([
    ["0s", 0],
    ["90s", 90_000],
    ["1h30m", 5_400_000],
  ])("draining for %s is %i ms", (drainTimeout, drainMs) => {
    expect(deploymentWish(deployment({ rollout: { drainTimeout } })).rollout.drainMs).toBe(drainMs);
  });

  test.each([
    ["safetensors BF16", {}, undefined],
    ["safetensors BF16", { container: "safetensors", quantisation: "BF16" }, undefined],
    ["GGUF Q4_K_M", { container: "gguf", quantisation: "Q4_K_M" }, undefined],
    ["config only, FP8", { quantisation: "FP8" }, undefined],
    ["safetensors BF16", { container: "gguf" }, "spec.format.container"],
    ["GGUF Q8_0", { quantisation: "Q4_K_M" }, "spec.format.quantisation"],
  ])("of %s the wish %j is refused at %s", (format, wish, field) => {
    const fault = formatFault(deployment({ format: wish }).format, { ...model, format });
    expect(fault?.field).toBe(field);
    if (fault !== undefined) expect(fault.detail).toContain(format);
  });

  test("the built-in models say their formats as the wish names them", async () => {
    const wish = deployment({ format: { container: "safetensors", quantisation: "BF16" } }).format;
    expect(formatFault(wish, model)).toBeUndefined();
  });

  test("a prediction that misses the slo is said with both numbers", () => {
    const prediction = { ttftMs: 120.25, itlMs: 9, tokensPerSecond: 1, concurrency: 1, bound: "memory" };
    const [notice, ...others] = sloNotices({ ttftMs: 100, itlMs: 10 }, prediction);
    expect(others).toEqual([]);
    expect(notice).toMatchObject({ field: "spec.slo.ttftMs", kind: "Needed" });
    expect(notice?.message).toContain("120.3 ms are predicted, 100 ms are wished for");
    expect(sloNotices({ ttftMs: undefined, itlMs: undefined }, prediction)).toEqual([]);
  });
});

describe("a draft pool", () => {
  const poolPaths = fieldPaths(toStructural(draftPoolSpec));

  test("runs on one rank, for as many sequences as it may follow", () => {
    const wish = poolWish(pool({ replicas: 3, gpu: { count: 1, product: "L40S" } }));
    expect(wish.plan.pins).toEqual({ ranks: 1, workers: 1 });
    expect([wish.replicas, wish.nodes.product]).toEqual([3, "L40S"]);
    expect(wish.notYet).toEqual([]);
  });

  test("the secret of a source is named, with its key", () => {
    const { source, notYet } = poolWish(pool({ model: { source: HF, auth: { secretName: "hub", key: "hf" } } }));
    expect(source.secret).toEqual({ name: "hub", key: "hf" });
    expect(notYet).toEqual([]);
  });

  test("target and draft meet under one word", () => {
    const broker = { url: "nats://broker:4222", token: "t" };
    const name = poolToken("team-a", "drafts");
    expect(name).toMatch(/^[\w-]+$/);
    expect(poolToken("team", "a-drafts")).not.toBe(poolToken("team-a", "drafts"));
    expect(speculationOptions(name, broker)).toMatchObject({ enabled: true, pool: name, natsUrl: broker.url });
    expect(draftOptions(name, broker)).toMatchObject({ pool: name, natsUrl: broker.url, natsToken: "t" });
    expect(speculationOptions(name, broker).draftTokens).toBeLessThanOrEqual(draftOptions(name, broker).draftTokensMax);
  });

  test("every field of it is one of a deployment's, but for the vocabularies", () => {
    const known = new Set(Object.keys(FIELDS));
    expect(poolPaths.filter((path) => !known.has(path))).toEqual(["vocabularies"]);
    expect(poolWish(pool({ vocabularies: ["00ff00ff00ff00ff"] })).vocabularies).toHaveLength(1);
  });

  // Its rule refuses every other value than the one that is planned.
  const fixed = ["gpu.count", "gpu.topology.nodes"];

  test.each(poolPaths.filter((path) => path in FIELDS && !fixed.includes(path)))("%s changes what is asked", (path) => {
    const [one = {}, other = {}] = FIELDS[path] ?? [];
    expect(poolWish(pool(other))).not.toEqual(poolWish(pool(one)));
  });

  test.each(fixed)("%s is refused where it is not 1", (path) => {
    expect(draftPoolSpec.safeParse({ model: { source: HF }, ...FIELDS[path]?.[1] }).success).toBe(false);
  });
});
