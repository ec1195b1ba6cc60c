// What an API server with the CRDs, and zod without one, must accept and refuse: the same list for both. Objects are as a
// user writes them; apply them with fieldValidation=Strict. A case with `before` is an update of that object.
import { accept, edit, type MatrixCase, refuse, type Spec } from "./matrix-case.ts";
import { deploymentCases } from "./matrix-deployment.ts";
import { draftPool, fullDeployment, fullPool, groupObject, minimalDeployment, planObject } from "./objects.ts";

export type { MatrixCase };

const VOCABULARY = "00ff00ff00ff00ff";
const pools: MatrixCase[] = [
  accept("the smallest pool", draftPool({})),
  accept("a draft pool with everything", fullPool()),
  accept("one GPU for a draft", draftPool({ gpu: { count: 1 } })),
  refuse("two GPUs for a draft", draftPool({ gpu: { count: 2 } }), "a draft runs on one GPU"),
  refuse(
    "two nodes for a draft",
    draftPool({ gpu: { topology: { nodes: 2 } } }),
    "a draft runs on one GPU of one node",
  ),
  refuse("no vocabulary at all", draftPool({ vocabularies: [] }), "spec.vocabularies"),
  refuse(
    "a vocabulary in capitals",
    draftPool({ vocabularies: ["00FF00FF00FF00FF"] }),
    "write a vocabulary as 16 hex digits",
  ),
  refuse("a vocabulary twice", draftPool({ vocabularies: [VOCABULARY, VOCABULARY] }), "spec.vocabularies[1]"),
  refuse("a pool without model", draftPool({ model: undefined }), "spec.model"),
  refuse("a pool with parallelism", draftPool({ parallelism: { tp: 2 } }), "spec.parallelism"),
];

const generated: MatrixCase[] = [
  accept("a stored plan", planObject({})),
  edit("a plan written again", planObject({}), planObject({})),
  edit("a plan with another context", planObject({}), planObject({ contextTokens: 1 }), "a ShardPlan never changes"),
  edit("a plan with another image", planObject({}), planObject({ image: "w@sha256:1" }), "a ShardPlan never changes"),
  refuse("a plan without cut", planObject({ cut: undefined }), "spec.cut"),
  refuse("a plan of no worker", planObject({ workers: 0 }), "spec.workers"),
  refuse(
    "a plan with an odd vocabulary",
    planObject({ model: { ...planObject({}).spec.model, vocabulary: "xyz" } }),
    "write a vocabulary",
  ),
  accept("a group", groupObject({})),
  edit("a group that drains", groupObject({}), groupObject({ state: "Draining" })),
  edit("a group that comes back", groupObject({ state: "Draining" }), groupObject({}), "does not come back"),
  edit("a group with another plan", groupObject({}), groupObject({ plan: "other" }), "a group keeps its plan"),
  edit(
    "a group with another ordinal",
    groupObject({}),
    groupObject({ ordinal: 1 }),
    "a group keeps its owner and ordinal",
  ),
  edit(
    "a group with another owner",
    groupObject({}),
    groupObject({ owner: { kind: "ModelDeployment", name: "b" } }),
    "a group keeps its owner and ordinal",
  ),
  refuse("a group of a Deployment", groupObject({ owner: { kind: "Deployment", name: "a" } }), "spec.owner.kind"),
  refuse("a group without plan", groupObject({ plan: undefined }), "spec.plan"),
  refuse("a plan name in capitals", groupObject({ plan: "P" }), "write the name of a ShardPlan"),
  refuse(
    "an owner name in capitals",
    groupObject({ owner: { kind: "DraftPool", name: "A" } }),
    "write the name of the owner",
  ),
];

const at = "2026-11-02T10:00:00Z";
const cause = {
  code: "loading",
  message: "12.0 GB of 40.0 GB",
  since: at,
  bytesLoaded: 12e9,
  bytesTotal: 40e9,
  eta: at,
};
const condition = {
  type: "Serving",
  status: "False",
  reason: "Loading",
  message: "",
  lastTransitionTime: at,
  observedGeneration: 1,
};
const common = { observedGeneration: 1, phase: "Loading", cause, conditions: [condition] };
const counted = { selector: "muster.dev/deployment=chat", replicas: 2, readyReplicas: 1, ready: "8/16" };
const notices = [{ field: "spec.kvCache.dtype", kind: "NotYet", message: "the engine has one KV type" }];

const statusOf = (name: string, stored: object, status: Spec, messagePart?: string): MatrixCase => {
  const written = { name, before: stored, object: { ...stored, status }, subresource: "status" as const };
  return messagePart === undefined ? { ...written, accepted: true } : { ...written, accepted: false, messagePart };
};

const statuses: MatrixCase[] = [
  statusOf("the status of a deployment", minimalDeployment({}), {
    ...common,
    ...counted,
    model: { source: "hf://o/n@c0ffee", digest: "ab", format: "safetensors BF16", family: "llama4", parameters: 402e9 },
    plan: "tp16·ep16·2x",
    planName: "chat-0123456789ab",
    revision: "0123456789ab",
    targetReplicas: 2,
    readyRanks: 8,
    ranks: 16,
    tokensPerSecond: 1234.5,
    throughput: "1.2k",
    eta: "3m20s",
    updated: "1 of 2 replaced",
    speculation: { active: true, pool: "drafts", detail: "2.1 tokens a step" },
    notices,
  }),
  statusOf("the status of a pool", draftPool({}), {
    ...common,
    ...counted,
    vocabulary: VOCABULARY,
    planName: "p",
    revision: "r",
    targets: ["chat"],
    notices,
  }),
  statusOf("the status of a plan", planObject({}), {
    observedGeneration: 1,
    conditions: [{ ...condition, type: "BetterPlan" }],
    expertMaps: [{ group: "chat-abcde-0", incarnation: 1, version: 3, digest: "ab", since: at }],
    measured: {
      at,
      ttftMs: 80,
      itlMs: 21.5,
      tokensPerSecond: 700,
      concurrency: 16,
      latencyConcurrency: 12,
      calibration: 0.82,
    },
    groups: 2,
  }),
  statusOf("the status of a group", groupObject({}), {
    ...common,
    record: {
      incarnation: 2,
      revision: "r",
      begun: true,
      failures: [{ at: "2026-11-02T10:00:00.123Z", detail: "worker 1 exited with code 1", isFinal: false }],
      notBefore: "2026-11-02T10:00:00.323Z",
      restarts: 1,
    },
    incarnation: 2,
    restarts: 1,
    placement: [{ worker: 0, node: "gpu-1", pod: "chat-0-2-0", firstRank: 0, ranks: 8 }],
    endpoints: [{ worker: 0, address: "chat-0-2-0.chat-0:7000" }],
    leader: "chat-0-2-0.chat-0:7000",
    numericsId: "cpu avx512",
    readyRanks: 8,
    ranks: 8,
    ready: "8/8",
    bytesLoaded: 12e9,
    bytesTotal: 40e9,
    tokensPerSecond: 700.25,
    throughput: "700",
    step: 100_000,
    stepAt: at,
  }),
  statusOf("a phase of our own", minimalDeployment({}), { phase: "Thinking" }, "status.phase"),
  statusOf(
    "a condition of our own",
    groupObject({}),
    { conditions: [{ ...condition, type: "Happy" }] },
    "status.conditions[0].type",
  ),
  statusOf("a condition twice", groupObject({}), { conditions: [condition, condition] }, "status.conditions[1]"),
  statusOf("an age that is no time", draftPool({}), { cause: { ...cause, since: "now" } }, "status.cause.since"),
];

export const matrix: readonly MatrixCase[] = [
  accept("the smallest deployment", minimalDeployment({})),
  accept("a deployment with everything", fullDeployment()),
  ...deploymentCases,
  ...pools,
  ...generated,
  ...statuses,
];
