// Random objects of the two kinds that users write, each with the verdict of zod: an API server with the CRDs must say the
// same. Most stray in one or two fields near a bound, because that is where CEL text and predicate could differ.
import { parseDraftPool, parseModelDeployment } from "../../../controller/api/parse.ts";
import type { MatrixCase, Spec } from "./matrix-case.ts";
import { draftPool, minimalDeployment } from "./objects.ts";

const ints = [0, 1, 1, 1, 2, 4, 8, 1000, 1001, 1024, 1025, 1.5, "4", -1];
/** Values at, below and above every bound, by field; most fields also hold one that is fine. */
const VALUES: Record<string, readonly unknown[]> = {
  "model.source": [
    "hf://a/b",
    "hf://a/b@c",
    "hf://a/b@c/d.gguf",
    "hf://a",
    "file:///x",
    "builtin://x",
    "",
    "x",
    "hf://a/b/c/d.gguf",
    "hf://a/b/.gguf",
    "hf://é/b",
    "https://x\ny",
  ],
  "model.revision": ["main", "a/b", "", "v1", "x".repeat(128), "x".repeat(129), "ab\n"],
  "model.auth": [
    {},
    { secretName: "a" },
    { secretName: "A" },
    { secretName: "a.b-", key: "k" },
    { secretName: "a", key: "" },
  ],
  "format.container": ["auto", "gguf", "x", null],
  "format.quantisation": ["auto", "Q8_0", "q8"],
  "parallelism.tp": ints,
  "parallelism.dp": ints,
  "parallelism.ep": ints,
  "parallelism.etp": ints,
  "parallelism.pp": ints,
  replicas: ints,
  "autoscale.min": ints,
  "autoscale.max": ints,
  "autoscale.targets.queue": ints,
  "autoscale.targets.ttftMs": ints,
  "slo.ttftMs": ints,
  "slo.contextTokens": ints,
  "slo.concurrency": ints,
  "kvCache.fraction": [0, 0.1, 1, 1.01, "x"],
  "kvCache.dtype": ["fp8", "x"],
  "kvCache.offload.hostMemory": [1, -1, "1Gi", "1.5Gi", "Gi", "1e3", "", "1\n", 1.5, true, "0".repeat(33)],
  "experts.redundant": ints,
  "experts.balancing": ["none", "measured", "off"],
  "speculation.draftPool": ["a", "A", "", "a_b", "a\n"],
  "speculation.method": ["none", "mtp", "x"],
  "speculation.lossless": ["L1", "L0"],
  "gpu.product": ["H100", "", "x".repeat(64), "é".repeat(63), "😀".repeat(40)],
  "gpu.count": ints,
  "gpu.topology.nodes": ints,
  "gpu.topology.within": ["any", "zone", "x"],
  "gpu.nodeSelector": [
    {},
    { a: "b" },
    { a: 1 },
    { ["k".repeat(317)]: "" },
    { ["k".repeat(318)]: "" },
    { ["😀".repeat(200)]: "" },
    { a: null },
  ],
  "gpu.tolerations": [
    [],
    [{}],
    [{ key: "a" }],
    [{ operator: "Exists" }],
    [{ operator: "Exists", value: "x" }],
    [{ key: "a", effect: "NoExecute", tolerationSeconds: -1 }],
    [{ key: "", value: "v" }],
    [null],
  ],
  "rollout.kind": ["surge", "x"],
  "rollout.drainTimeout": [
    "5m",
    "",
    "1h1m1s",
    "24h",
    "24h1s",
    "1m1h",
    "86400s",
    "86401s",
    "1.5h",
    "99999h",
    "5m\n",
    "5 m",
  ],
  priority: [0, 1000, 1001, -1000, -1001],
  "podPatch.labels": [{}, { a: "b" }, { "muster.dev/a": "b" }, { "x.muster.dev/a": "b" }],
  "podPatch.queueLabels": [{}, { a: "b" }, { "kueue.x-k8s.io/q": "b" }],
  "podPatch.env": [
    [],
    [{ name: "A", value: "" }],
    [
      { name: "A", value: "" },
      { name: "A", value: "x" },
    ],
    [{ name: "LD_X", value: "" }],
    [{ name: "LDX", value: "" }],
    [{ name: "MUSTER_X", value: "" }],
    [{ name: "NODE_OPTIONS_X", value: "" }],
    [{ name: "1A", value: "" }],
    [{ name: "A\n", value: "" }],
    [{ name: "A" }],
    [{ name: "A", value: "", valueFrom: {} }],
  ],
  "podPatch.resources.requests": [
    { cpu: 1 },
    { cpu: "1" },
    { cpu: "x" },
    { "nvidia.com/gpu": 1 },
    { "amd.com/gpu": "1" },
    { cpu: -1 },
  ],
  "podPatch.hostCache": [
    {},
    { path: "/" },
    { path: "/var/cache/muster" },
    { path: "/var/cache/muster/" },
    { path: "/var/cache/muster/a..b" },
    { path: "/var/cache/musterx" },
  ],
  "podPatch.imagePullSecrets": [[{ name: "a" }], [{ name: "a" }, { name: "a" }], [{}], [{ name: "A" }]],
  "podPatch.ipcLock": [true, false, "x"],
  "podPatch.priorityClassName": ["a", "A"],
  "podPatch.volumes": [[]],
  unknown: [1],
  vocabularies: [["00ff00ff00ff00ff"], ["00FF"], [], ["00ff00ff00ff00ff", "00ff00ff00ff00ff"]],
};
const NAMES = ["chat", "a", "a".repeat(40), "a".repeat(41), "1a", "a-", "a.b"];
const AREAS = ["parallelism", "gpu", "autoscale", "podPatch", "model", "speculation", ""];
const FIELDS_MAX = 4;

/** The same seed gives the same cases; their names hold the objects. */
export function randomCases(seed: number, count: number): MatrixCase[] {
  const random = generator(seed);
  return Array.from({ length: count }, () => randomCase(random));
}

function randomCase(random: () => number): MatrixCase {
  const pick = <T>(list: readonly T[]): T | undefined => list[Math.floor(random() * list.length)];
  const isPool = random() < 0.2;
  const area = pick(AREAS) ?? "";
  const fields = Object.keys(VALUES).filter((field) => field.startsWith(area));
  const spec: Spec = { model: { source: "hf://org/name" } };
  for (let left = 1 + Math.floor(random() * FIELDS_MAX); left > 0; left--) {
    const field = pick(fields) ?? "replicas";
    set(spec, field.split("."), structuredClone(pick(VALUES[field] ?? [])));
  }
  const made = isPool ? draftPool(spec) : minimalDeployment(spec);
  const name = random() < 0.9 ? made.metadata.name : (pick(NAMES) ?? "");
  const object = { ...made, metadata: { ...made.metadata, name } };
  const parsed = isPool ? parseDraftPool(object) : parseModelDeployment(object);
  return { name: JSON.stringify(object), object, accepted: parsed.kind === "ok" };
}

function set(spec: Spec, path: readonly string[], value: unknown): void {
  const [key = "", ...rest] = path;
  if (rest.length === 0) {
    spec[key] = value;
    return;
  }
  const held = spec[key];
  const child: Spec = typeof held === "object" && held !== null ? { ...held } : {};
  spec[key] = child;
  set(child, rest, value);
}

/** mulberry32 */
function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
