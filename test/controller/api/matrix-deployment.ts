// The cases of a ModelDeployment's spec.
import { accept, edit, type MatrixCase, refuse, refuses, type Spec, takes } from "./matrix-case.ts";
import { minimalDeployment } from "./objects.ts";

const pinned = (pins: Spec, more: Spec = {}) => ({ parallelism: pins, ...more });
const patch = (podPatch: Spec) => ({ podPatch });

const source = (text: unknown, more: Spec = {}) => ({ model: { source: text, ...more } });

const models: MatrixCase[] = [
  ...[
    "hf://org/name",
    "hf://org/name@main/file.gguf",
    "https://host/x",
    "s3://b/k",
    "pvc://claim/path",
    "file:///x",
  ].map((text) => takes(`source ${text}`, source(text))),
  takes("a revision of an hf source", source("hf://org/name", { revision: "v1.0" })),
  takes("a secret for the source", source("hf://org/name", { auth: { secretName: "hub" } })),
  refuse("no spec at all", { ...minimalDeployment({}), spec: undefined }, "spec"),
  refuse("no model", { ...minimalDeployment({}), spec: {} }, "spec.model"),
  refuses("no source", { model: {} }, "spec.model.source"),
  refuses("an empty source", source(""), "spec.model.source"),
  refuses("a source longer than its bound", source(`https://${"x".repeat(1020)}`), "spec.model.source"),
  refuses("a bare repository", source("org/name"), "write a source that begins with hf://"),
  refuses("an unknown scheme", source("ftp://x"), "write a source that begins with hf://"),
  refuses("an hf source without organisation", source("hf://name"), "write hf://org/name"),
  refuses("a revision of a file", source("file:///x", { revision: "main" }), "a revision belongs to an hf:// source"),
  refuses("two revisions", source("hf://o/n@a", { revision: "b" }), "keep one of the two"),
  refuses("a revision with a slash", source("hf://o/n", { revision: "a/b" }), "write a branch, tag or commit"),
  refuses(
    "a secret for a builtin model",
    { model: { source: "builtin://nano-maverick", auth: { secretName: "x" } } },
    "remove auth",
  ),
  refuses("a secret without name", source("hf://o/n", { auth: {} }), "spec.model.auth.secretName"),
  refuses(
    "a secret name in capitals",
    source("hf://o/n", { auth: { secretName: "Hub" } }),
    "write the name of a Secret",
  ),
  refuses("an unknown container", { format: { container: "onnx" } }, "spec.format.container"),
  refuses("an unknown quantisation", { format: { quantisation: "q3" } }, "spec.format.quantisation"),
];

const sizes: MatrixCase[] = [
  takes("no pins", pinned({})),
  takes("null, which is as if left out", {
    parallelism: { tp: null },
    rollout: null,
    gpu: { nodeSelector: { a: null } },
  }),
  takes("one pin", pinned({ tp: 4 })),
  takes("equal products", pinned({ tp: 4, dp: 2, ep: 8, etp: 1 })),
  takes("a count that is the product", pinned({ tp: 4, dp: 1, pp: 2 }, { gpu: { count: 8 } })),
  refuses("a size of 0", pinned({ tp: 0 }), "spec.parallelism.tp"),
  refuses("a size above the bound", pinned({ ep: 1025 }), "spec.parallelism.ep"),
  refuses("a fraction of a rank", pinned({ etp: 1.5 }), "spec.parallelism.etp"),
  refuses("different products", pinned({ tp: 4, dp: 2, ep: 4, etp: 1 }), "tp x dp and ep x etp are the same ranks"),
  refuses("a thousand ranks too many", pinned({ tp: 512, dp: 4 }), "tp x dp x pp may be 1024 ranks at most"),
  refuses("a count that is not tp x dp", pinned({ tp: 4, dp: 1 }, { gpu: { count: 8 } }), "gpu.count is tp x dp x pp"),
  refuses(
    "a count that is not ep x etp",
    pinned({ ep: 4, etp: 1 }, { gpu: { count: 8 } }),
    "gpu.count is ep x etp x pp",
  ),
  takes("gpus spread evenly", { gpu: { count: 16, topology: { nodes: 2, within: "zone" } } }),
  refuses("a product with a space", { gpu: { product: "H200 NVL" } }, "as the label on the nodes"),
  refuses("no gpu", { gpu: { count: 0 } }, "spec.gpu.count"),
  refuses("gpus that do not spread", { gpu: { count: 16, topology: { nodes: 3 } } }, "write a multiple of it"),
  refuses("an unknown domain", { gpu: { topology: { within: "rack" } } }, "spec.gpu.topology.within"),
  refuses("a selector that is no text", { gpu: { nodeSelector: { pool: 1 } } }, "spec.gpu.nodeSelector"),
  refuses(
    "a key longer than a label's",
    { gpu: { nodeSelector: { ["k".repeat(318)]: "x" } } },
    "write keys such as team",
  ),
  refuses(
    "too many selectors",
    { gpu: { nodeSelector: Object.fromEntries(Array.from({ length: 33 }, (_, i) => [`k${i}`, "x"])) } },
    "spec.gpu.nodeSelector",
  ),
  takes("a toleration of everything", { gpu: { tolerations: [{ operator: "Exists" }] } }),
  refuses(
    "Exists with a value",
    { gpu: { tolerations: [{ key: "a", operator: "Exists", value: "b" }] } },
    "remove value",
  ),
  refuses("Equal without key", { gpu: { tolerations: [{ value: "b" }] } }, "write operator: Exists, or give the key"),
  refuses(
    "an unknown effect",
    { gpu: { tolerations: [{ key: "a", effect: "Never" }] } },
    "spec.gpu.tolerations[0].effect",
  ),
];

const scale = (min: unknown, max: unknown, targets: Spec = { queue: 4 }) => ({ autoscale: { min, max, targets } });
const deployed = (before: Spec, next: Spec): [unknown, unknown] => [minimalDeployment(before), minimalDeployment(next)];

const scaling: MatrixCase[] = [
  takes("no replica", { replicas: 0 }),
  takes("scale to zero", scale(0, 4)),
  takes("as many as ever", scale(4, 4)),
  takes("targets of time", scale(1, 4, { ttftMs: 500, itlMs: 30 })),
  refuses("fewer than no replica", { replicas: -1 }, "spec.replicas"),
  refuses("too many replicas", { replicas: 1001 }, "spec.replicas"),
  refuses("min above max", scale(5, 4), "min is above max"),
  refuses("no max", { autoscale: { targets: { queue: 1 } } }, "spec.autoscale.max"),
  refuses("a max of 0", scale(0, 0), "spec.autoscale.max"),
  refuses("no target", scale(0, 4, {}), "write at least one of queue, ttftMs and itlMs"),
  refuses("targets left out", { autoscale: { max: 2 } }, "spec.autoscale.targets"),
  edit("replicas edited", ...deployed({ replicas: 1 }, { replicas: 5 })),
  edit("autoscale added with other replicas", ...deployed({ replicas: 3 }, { replicas: 1, ...scale(0, 4) })),
  edit("autoscale removed with other replicas", ...deployed({ replicas: 3, ...scale(0, 4) }, { replicas: 1 })),
  edit("max edited", ...deployed(scale(0, 4), scale(0, 8))),
  edit(
    "replicas edited while autoscale is set",
    ...deployed({ replicas: 1, ...scale(0, 4) }, { replicas: 2, ...scale(0, 4) }),
    "autoscale decides the replicas",
  ),
];

const wishes: MatrixCase[] = [
  takes("a whole slo", { slo: { ttftMs: 500, itlMs: 30, contextTokens: 131_072, concurrency: 64 } }),
  refuses("a context of 0", { slo: { contextTokens: 0 } }, "spec.slo.contextTokens"),
  refuses("a context as text", { slo: { contextTokens: "8k" } }, "spec.slo.contextTokens"),
  refuses("no sequence at once", { slo: { concurrency: 0 } }, "spec.slo.concurrency"),
  refuses("a ttft of 0", { slo: { ttftMs: 0 } }, "spec.slo.ttftMs"),
  refuses("an itl of an hour and more", { slo: { itlMs: 3_600_001 } }, "spec.slo.itlMs"),
  takes("all of the memory for KV", { kvCache: { fraction: 1 } }),
  takes("offload as text and as a number", { kvCache: { offload: { hostMemory: 68_719_476_736 } } }),
  refuses("no memory for KV", { kvCache: { fraction: 0 } }, "spec.kvCache.fraction"),
  refuses("more memory than there is", { kvCache: { fraction: 1.1 } }, "spec.kvCache.fraction"),
  refuses("an unknown KV type", { kvCache: { dtype: "int4" } }, "spec.kvCache.dtype"),
  refuses("a quantity without number", { kvCache: { offload: { hostMemory: "Gi" } } }, "write a quantity such as"),
  refuses("a negative quantity", { kvCache: { offload: { hostMemory: -1 } } }, "spec.kvCache.offload.hostMemory"),
  refuses("fewer than no copies", { experts: { redundant: -1 } }, "spec.experts.redundant"),
  refuses("copies that nobody places", { experts: { redundant: 2 } }, "which experts are busy is measured"),
  refuses("an unknown balancing", { experts: { balancing: "magic" } }, "spec.experts.balancing"),
  takes("a draft pool", { speculation: { draftPool: "drafts", lossless: "L2" } }),
  takes("no speculation", { speculation: { method: "none" } }),
  refuses(
    "pool and method",
    { speculation: { draftPool: "drafts", method: "mtp" } },
    "write draftPool or method, not both",
  ),
  refuses("a pool name in capitals", { speculation: { draftPool: "Drafts" } }, "write the name of a DraftPool"),
  refuses("a lossy level", { speculation: { lossless: "L3" } }, "spec.speculation.lossless"),
  refuses("an unknown method", { speculation: { method: "tea" } }, "spec.speculation.method"),
  takes("in place, at once", { rollout: { kind: "inPlace", drainTimeout: "0s" } }),
  takes("a day of draining", { rollout: { drainTimeout: "24h" } }),
  refuses("an unknown rollout", { rollout: { kind: "recreate" } }, "spec.rollout.kind"),
  refuses("more than a day of draining", { rollout: { drainTimeout: "24h1s" } }, "write a duration of at most 24h"),
  refuses("a duration without unit", { rollout: { drainTimeout: "30" } }, "write a duration of at most 24h"),
  refuses("a priority out of bounds", { priority: 1001 }, "spec.priority"),
];

const podPatches: MatrixCase[] = [
  takes("labels of a team", patch({ labels: { team: "search" }, annotations: { "example.com/a": "b c" } })),
  takes("labels of a queue", patch({ queueLabels: { "kueue.x-k8s.io/queue-name": "gpus" } })),
  takes("a cache of the host", patch({ hostCache: {} })),
  takes("a folder below the cache", patch({ hostCache: { path: "/var/cache/muster/models" } })),
  takes("locked memory", patch({ ipcLock: true })),
  refuses(
    "a label of ours",
    patch({ labels: { "muster.dev/plan": "x" } }),
    "keys under muster.dev/ are written by the controller",
  ),
  refuses("an annotation of ours", patch({ annotations: { "muster.dev/x": "x" } }), "keys under muster.dev/"),
  refuses(
    "another label as a queue's",
    patch({ queueLabels: { team: "a" } }),
    "put other labels under podPatch.labels",
  ),
  refuses("a label value with a space", patch({ labels: { a: "b c" } }), "write label values of at most 63"),
  refuses("an annotation key with a space", patch({ annotations: { "a b": "" } }), "write keys such as team"),
  refuses("a label value too long", patch({ labels: { a: "x".repeat(64) } }), "spec.podPatch.labels"),
  refuses("a variable with a dash", patch({ env: [{ name: "A-B", value: "" }] }), "write a variable name of letters"),
  refuses("a preloaded library", patch({ env: [{ name: "LD_PRELOAD", value: "/x" }] }), "are the controller's"),
  refuses("options of Node", patch({ env: [{ name: "NODE_OPTIONS", value: "--inspect" }] }), "are the controller's"),
  refuses("a variable without value", patch({ env: [{ name: "A" }] }), "spec.podPatch.env[0].value"),
  refuses(
    "a variable twice",
    patch({
      env: [
        { name: "A", value: "1" },
        { name: "A", value: "2" },
      ],
    }),
    "spec.podPatch.env[1]",
  ),
  refuses("a GPU count", patch({ resources: { limits: { "nvidia.com/gpu": 8 } } }), "write spec.gpu.count"),
  refuses(
    "memory that is no quantity",
    patch({ resources: { requests: { memory: "lots" } } }),
    "write a quantity such as",
  ),
  refuses(
    "the whole disk of a host",
    patch({ hostCache: { path: "/" } }),
    "a host cache lies at /var/cache/muster or below",
  ),
  refuses(
    "a way out of the cache",
    patch({ hostCache: { path: "/var/cache/muster/../../.." } }),
    "a host cache lies at",
  ),
  refuses("a neighbour of the cache", patch({ hostCache: { path: "/var/cache/muster-2" } }), "a host cache lies at"),
  refuses("a pull secret in capitals", patch({ imagePullSecrets: [{ name: "Reg" }] }), "write the name of a Secret"),
  refuses("a class name in capitals", patch({ priorityClassName: "High" }), "write the name of a PriorityClass"),
  refuses(
    "a pull secret twice",
    patch({ imagePullSecrets: [{ name: "a" }, { name: "a" }] }),
    "spec.podPatch.imagePullSecrets[1]",
  ),
  // What the allow-list does not have.
  ...["serviceAccountName", "volumes", "securityContext", "hostNetwork", "containers", "nodeName"].map((field) =>
    refuses(`podPatch.${field}`, patch({ [field]: "x" }), `spec.podPatch.${field}`),
  ),
  refuses(
    "a secret as a variable",
    patch({ env: [{ name: "A", value: "", valueFrom: { secretKeyRef: { name: "s", key: "k" } } }] }),
    "spec.podPatch.env[0].valueFrom",
  ),
];

const names: MatrixCase[] = [
  refuses("an unknown field", { tensorParallel: 8 }, "spec.tensorParallel"),
  refuse("a name with a dot", named("a.b"), "host names are made from this name"),
  refuse("a name that begins with a digit", named("8b"), "host names are made from this name"),
  refuse("a name of 41 characters", named("a".repeat(41)), "host names are made from this name"),
  accept("a name of 40 characters", named("a".repeat(40))),
];

function named(name: string) {
  return { ...minimalDeployment({}), metadata: { name, namespace: "default" } };
}

export const deploymentCases: readonly MatrixCase[] = [
  ...models,
  ...sizes,
  ...scaling,
  ...wishes,
  ...podPatches,
  ...names,
];
