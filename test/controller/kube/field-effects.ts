// What each field of a ModelDeployment and of a DraftPool does: two values of it, and what is seen of each in the objects that a
// controller makes. Owns the two tables; ON_SERVER is played against a real API server (test/cluster/kubelet/fields.test.ts),
// IN_SIM is what shows only once workers serve or something changes (fields.test.ts here, which also checks that no field lacks).
import { valuesAt } from "../api/leaves.ts";

export type Spec = Record<string, unknown>;

/** Of one owner: its status, its plan's spec, and what is made from that. Inspectors are pods that look at its source. */
export type Seen = {
  status: unknown;
  plan: unknown;
  groups: readonly unknown[];
  pods: readonly unknown[];
  inspectors: readonly unknown[];
};

type Case = [spec: Spec, sees: unknown];
/** `look` answers undefined where nothing can be told yet. */
export type Effect = { look: (seen: Seen) => unknown; cases: [Case, Case] };

export const NANO = "builtin://nano-maverick";
export const DRAFT = "builtin://nano-draft";
const DRAFT_POOL = "muster.dev/draft-pool";
const MANY_BLOCKS = 100_000;

const effect = (look: Effect["look"], one: Case, other: Case): Effect => ({ look, cases: [one, other] });

// ---- specs ----

/** One GPU, so that nothing but the field decides. */
const nano = (more: Spec = {}): Spec => ({ model: { source: NANO }, gpu: { count: 1 }, ...more });
const gpu = (more: Spec): Spec => nano({ gpu: { count: 1, ...more } });
const two = (more: Spec = {}): Spec => nano({ gpu: { count: 2 }, ...more });
const patch = (podPatch: Spec): Spec => nano({ podPatch });
const slo = (more: Spec): Spec => nano({ slo: more });
const hub = (auth: Spec, more: Spec = {}): Spec =>
  nano({ model: { source: "hf://org/name", auth: { secretName: "a", ...auth }, ...more } });
const variable = (name: string, value: string): Spec => patch({ env: [{ name, value }] });
const spread = (within: string): Spec => gpu({ count: 2, product: "H200", topology: { nodes: 2, within } });

// ---- looks ----

const inPlan =
  (path: string): Effect["look"] =>
  ({ plan }) =>
    plan === undefined ? undefined : valuesAt(plan, path)[0];
const inPods =
  (path: string): Effect["look"] =>
  ({ pods: [pod] }) =>
    pod === undefined ? undefined : valuesAt(pod, path);
const inInspector =
  (path: string): Effect["look"] =>
  ({ inspectors: [pod] }) =>
    pod === undefined ? undefined : valuesAt(pod, path)[0];
/** The value under a key of a map of the first object. */
const keyed =
  (of: (seen: Seen) => unknown, path: string, key: string): Effect["look"] =>
  (seen) => {
    const object = of(seen);
    return object === undefined ? undefined : (Object(valuesAt(object, path)[0])[key] ?? "none");
  };
const inPod = ({ pods: [pod] }: Seen) => pod;
const inGroup = ({ groups: [group] }: Seen) => group;
const noticed =
  (field: string): Effect["look"] =>
  ({ status, plan }) =>
    plan === undefined ? undefined : valuesAt(status, "notices[].field").includes(field);
/** Planned, or refused for a reason that holds these words. */
const verdict =
  (words: string): Effect["look"] =>
  ({ status, plan }) => {
    if (plan !== undefined) return "planned";
    const said = [...valuesAt(status, "cause.message"), ...valuesAt(status, "conditions[].message")];
    return said.some((text) => String(text).includes(words)) ? "refused" : undefined;
  };
/** Tolerations that are the wish's: the server and the controller add others. */
const tolerations: Effect["look"] = ({ pods: [pod] }) => {
  if (pod === undefined) return undefined;
  return valuesAt(pod, "spec.tolerations[]").filter((each) => String(Object(each).key).startsWith("x-"));
};
const variables: Effect["look"] = ({ pods: [pod] }) => {
  if (pod === undefined) return undefined;
  return valuesAt(pod, "spec.containers[].env[]").filter((each) => /^X_/.test(Object(each).name));
};

// ---- fields ----

const toleration = (of: (list: Spec[]) => Spec) => {
  const pair = (one: Spec, other: Spec): Effect => {
    const as = (one: Spec): Case => [of([one]), [one]];
    return effect(tolerations, as(one), as(other));
  };
  const plain = { key: "x-a", operator: "Equal", value: "x" };
  return {
    key: pair(plain, { ...plain, key: "x-b" }),
    operator: pair(plain, { key: "x-a", operator: "Exists" }),
    value: pair(plain, { ...plain, value: "y" }),
    effect: pair(plain, { ...plain, effect: "NoExecute" }),
    seconds: pair({ ...plain, effect: "NoExecute" }, { ...plain, effect: "NoExecute", tolerationSeconds: 3 }),
  };
};
const ofGpu = toleration((list) => gpu({ tolerations: list }));
const ofPatch = toleration((list) => patch({ tolerations: list }));

export const ON_SERVER: Readonly<Record<string, Effect>> = {
  "model.source": effect(inPlan("model.source"), [nano(), NANO], [nano({ model: { source: DRAFT } }), DRAFT]),
  "model.revision": effect(
    inInspector("spec.containers[].args[]"),
    [hub({}), "hf://org/name"],
    [hub({}, { revision: "v1" }), "hf://org/name@v1"],
  ),
  "model.auth.secretName": effect(
    inInspector("spec.containers[].env[].valueFrom.secretKeyRef.name"),
    [hub({}), "a"],
    [hub({ secretName: "b" }), "b"],
  ),
  "model.auth.key": effect(
    inInspector("spec.containers[].env[].valueFrom.secretKeyRef.key"),
    [hub({}), "token"],
    [hub({ key: "k" }), "k"],
  ),
  "format.container": effect(
    verdict("spec.format.container"),
    [nano({ format: { container: "safetensors" } }), "planned"],
    [nano({ format: { container: "gguf" } }), "refused"],
  ),
  "format.quantisation": effect(
    verdict("spec.format.quantisation"),
    [nano({ format: { quantisation: "BF16" } }), "planned"],
    [nano({ format: { quantisation: "Q8_0" } }), "refused"],
  ),
  "parallelism.tp": effect(
    inPlan("cut.tp"),
    [{ model: { source: NANO }, parallelism: { tp: 1 } }, 1],
    [{ model: { source: NANO }, parallelism: { tp: 2 } }, 2],
  ),
  "parallelism.dp": effect(
    verdict("dp 2:"),
    [two({ parallelism: { dp: 1 } }), "planned"],
    [two({ parallelism: { dp: 2 } }), "refused"],
  ),
  "parallelism.ep": effect(
    inPlan("cut.ep"),
    [two({ parallelism: { ep: 1 } }), 1],
    [two({ parallelism: { ep: 2 } }), 2],
  ),
  "parallelism.etp": effect(
    inPlan("cut.etp"),
    [two({ parallelism: { etp: 1 } }), 1],
    [two({ parallelism: { etp: 2 } }), 2],
  ),
  "parallelism.pp": effect(
    verdict("pp 2:"),
    [two({ parallelism: { pp: 1 } }), "planned"],
    [two({ parallelism: { pp: 2 } }), "refused"],
  ),
  replicas: effect(({ groups }) => groups.length, [nano(), 1], [nano({ replicas: 2 }), 2]),
  "autoscale.min": effect(
    ({ status }) => valuesAt(status, "targetReplicas")[0],
    [nano({ autoscale: { max: 4, targets: { queue: 1 } } }), 1],
    [nano({ autoscale: { min: 2, max: 4, targets: { queue: 1 } } }), 2],
  ),
  "slo.ttftMs": effect(
    noticed("spec.slo.ttftMs"),
    [slo({ concurrency: 16_384, ttftMs: 1_000 }), false],
    [slo({ concurrency: 16_384, ttftMs: 1 }), true],
  ),
  "slo.itlMs": effect(
    noticed("spec.slo.itlMs"),
    [slo({ concurrency: 16_384, itlMs: 1_000 }), false],
    [slo({ concurrency: 16_384, itlMs: 1 }), true],
  ),
  "slo.contextTokens": effect(inPlan("contextTokens"), [nano(), 2048], [slo({ contextTokens: 1024 }), 1024]),
  "slo.concurrency": effect(inPlan("prediction.concurrency"), [nano(), 16], [slo({ concurrency: 17 }), 17]),
  "kvCache.dtype": effect(noticed("spec.kvCache.dtype"), [nano(), false], [nano({ kvCache: { dtype: "fp8" } }), true]),
  "kvCache.fraction": effect(
    ({ plan }) => (plan === undefined ? undefined : Number(valuesAt(plan, "kv.blocks")[0]) > MANY_BLOCKS),
    [nano(), false],
    [nano({ kvCache: { fraction: 0.5 } }), true],
  ),
  "kvCache.offload.hostMemory": effect(
    noticed("spec.kvCache.offload"),
    [nano(), false],
    [nano({ kvCache: { offload: { hostMemory: "1Gi" } } }), true],
  ),
  "experts.redundant": effect(
    ({ plan }) => (plan === undefined ? undefined : (valuesAt(plan, "expertCopies")[0] ?? 0)),
    [two({ parallelism: { ep: 2 }, experts: { balancing: "measured" } }), 0],
    [two({ parallelism: { ep: 2 }, experts: { balancing: "measured", redundant: 2 } }), 2],
  ),
  "speculation.draftPool": effect(
    keyed(inGroup, "metadata.annotations", DRAFT_POOL),
    [nano(), "none"],
    [nano({ speculation: { draftPool: "drafts" } }), "drafts"],
  ),
  "speculation.method": effect(
    noticed("spec.speculation.method"),
    [nano(), false],
    [nano({ speculation: { method: "lookup" } }), true],
  ),
  "speculation.lossless": effect(
    noticed("spec.speculation.lossless"),
    [nano(), false],
    [nano({ speculation: { lossless: "L2" } }), true],
  ),
  "gpu.product": effect(
    ({ groups: [group] }) => valuesAt(group, "status.placement[].node")[0],
    [gpu({ product: "L40S" }), "l40s"],
    [gpu({ product: "H100" }), "h100"],
  ),
  "gpu.count": effect(inPlan("cut.world"), [gpu({ count: 1 }), 1], [gpu({ count: 2 }), 2]),
  "gpu.nodeSelector": effect(
    inPods("spec.nodeSelector"),
    [gpu({ nodeSelector: { pool: "one" } }), [{ pool: "one" }]],
    [gpu({ nodeSelector: { pool: "two" } }), [{ pool: "two" }]],
  ),
  "gpu.tolerations[].key": ofGpu.key,
  "gpu.tolerations[].operator": ofGpu.operator,
  "gpu.tolerations[].value": ofGpu.value,
  "gpu.tolerations[].effect": ofGpu.effect,
  "gpu.tolerations[].tolerationSeconds": ofGpu.seconds,
  "gpu.topology.nodes": effect(
    ({ pods }) => pods.length,
    [gpu({ count: 2, topology: { nodes: 1 } }), 1],
    [gpu({ count: 2, topology: { nodes: 2 } }), 2],
  ),
  "gpu.topology.within": effect(verdict("gpu.topology"), [spread("any"), "planned"], [spread("zone"), "refused"]),
  "rollout.drainTimeout": effect(
    inPods("spec.terminationGracePeriodSeconds"),
    [nano({ rollout: { drainTimeout: "5s" } }), [15]],
    [nano({ rollout: { drainTimeout: "1m30s" } }), [100]],
  ),
  "podPatch.labels": effect(
    keyed(inPod, "metadata.labels", "x-team"),
    [patch({}), "none"],
    [patch({ labels: { "x-team": "b" } }), "b"],
  ),
  "podPatch.annotations": effect(
    keyed(inPod, "metadata.annotations", "x-note"),
    [patch({}), "none"],
    [patch({ annotations: { "x-note": "b" } }), "b"],
  ),
  "podPatch.queueLabels": effect(
    keyed(inPod, "metadata.labels", "kueue.x-k8s.io/queue-name"),
    [patch({}), "none"],
    [patch({ queueLabels: { "kueue.x-k8s.io/queue-name": "q" } }), "q"],
  ),
  "podPatch.env[].name": effect(
    variables,
    [variable("X_A", "1"), [{ name: "X_A", value: "1" }]],
    [variable("X_B", "1"), [{ name: "X_B", value: "1" }]],
  ),
  "podPatch.env[].value": effect(
    variables,
    [variable("X_A", "1"), [{ name: "X_A", value: "1" }]],
    [variable("X_A", "2"), [{ name: "X_A", value: "2" }]],
  ),
  "podPatch.resources.requests": effect(
    inPods("spec.containers[].resources.requests.cpu"),
    [patch({}), []],
    [patch({ resources: { requests: { cpu: 1 } } }), ["1"]],
  ),
  "podPatch.resources.limits": effect(
    inPods("spec.containers[].resources.limits.cpu"),
    [patch({}), []],
    [patch({ resources: { limits: { cpu: 2 } } }), ["2"]],
  ),
  "podPatch.tolerations[].key": ofPatch.key,
  "podPatch.tolerations[].operator": ofPatch.operator,
  "podPatch.tolerations[].value": ofPatch.value,
  "podPatch.tolerations[].effect": ofPatch.effect,
  "podPatch.tolerations[].tolerationSeconds": ofPatch.seconds,
  "podPatch.priorityClassName": effect(
    inPods("spec.priorityClassName"),
    [patch({}), []],
    [patch({ priorityClassName: "high" }), ["high"]],
  ),
  "podPatch.imagePullSecrets[].name": effect(
    inPods("spec.imagePullSecrets[].name"),
    [patch({ imagePullSecrets: [{ name: "a" }] }), ["a"]],
    [patch({ imagePullSecrets: [{ name: "b" }] }), ["b"]],
  ),
  "podPatch.hostCache.path": effect(
    inPods("spec.volumes[].hostPath.path"),
    [patch({ hostCache: {} }), ["/var/cache/muster"]],
    [patch({ hostCache: { path: "/var/cache/muster/x" } }), ["/var/cache/muster/x"]],
  ),
  "podPatch.ipcLock": effect(
    inPods("spec.containers[].securityContext.capabilities.add[]"),
    [patch({}), []],
    [patch({ ipcLock: true }), ["IPC_LOCK"]],
  ),
};

/** Fields of a ModelDeployment that fields.test.ts looks at. */
export const IN_SIM = [
  "autoscale.max",
  "autoscale.targets.queue",
  "autoscale.targets.ttftMs",
  "autoscale.targets.itlMs",
  "experts.balancing",
  "rollout.kind",
  "priority",
] as const;

/** Of a DraftPool: where it differs from a ModelDeployment of the same fields. */
const POOL_OWN: Readonly<Record<string, Effect>> = {
  "model.source": effect(
    inPlan("model.source"),
    [{ model: { source: DRAFT } }, DRAFT],
    [{ model: { source: NANO } }, NANO],
  ),
  vocabularies: effect(
    verdict("spec.vocabularies"),
    [{ model: { source: DRAFT } }, "planned"],
    [{ model: { source: DRAFT }, vocabularies: ["00ff00ff00ff00ff"] }, "refused"],
  ),
};

/** One GPU of one node: other counts are refused (the validation matrix), and one GPU shares every domain with itself. */
export const POOL_FIXED = ["gpu.count", "gpu.topology.nodes", "gpu.topology.within"];

/** Undefined where nothing shows it. */
export function poolEffect(path: string): Effect | undefined {
  const own = POOL_OWN[path];
  if (own !== undefined) return own;
  const same = ON_SERVER[path];
  if (same === undefined) return undefined;
  const [one, other] = same.cases;
  return effect(same.look, [asPool(one[0]), one[1]], [asPool(other[0]), other[1]]);
}

/** The same wish of the small model. */
function asPool(spec: Spec): Spec {
  const { model, ...rest } = spec;
  return { ...rest, model: Object(model).source === NANO ? { source: DRAFT } : model };
}
