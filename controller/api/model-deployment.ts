// ModelDeployment: what a user writes to have a model served. Owns its fields, defaults and rules; what a field does is in
// mapping.ts.
import { z } from "zod";
import { cause, conditions, phase } from "./conditions.ts";
import { count, duration, labelMap, labelValue, objectName, quantity, tolerations } from "./fields.ts";
import { podPatch } from "./pod-patch.ts";
import { type EditRule, type Rule, withRules } from "./rules.ts";

const SOURCE_MAX = 1024;
const SCHEMES = ["hf://", "https://", "http://", "s3://", "pvc://", "file://", "builtin://"];
/** Of one deployment: a replica is a group of GPUs, thousands of them are another product. */
export const REPLICAS_MAX = 1000;
/** As the planner has it: larger groups are no single replica. */
export const RANKS_MAX = 1024;
const CONCURRENCY_MAX = 65_536;
const CONTEXT_MAX = 16_777_216;
const MILLIS_MAX = 3_600_000;

const PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}";
const REVISION = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}";
/** As controller/model reads it. */
const HF = `^hf://${PART}/${PART}(@${REVISION})?(/[^/]+[.]gguf)?$`;
const isHf = new RegExp(HF);
const isRevision = new RegExp(`^${REVISION}$`);

const modelSource = withRules(z.string().min(1).max(SOURCE_MAX), [
  {
    cel: SCHEMES.map((scheme) => `self.startsWith('${scheme}')`).join(" || "),
    message: `write a source that begins with ${SCHEMES.join(", ")}, such as hf://org/name`,
    holds: (source) => SCHEMES.some((scheme) => source.startsWith(scheme)),
  },
  {
    cel: `!self.startsWith('hf://') || self.matches('${HF}')`,
    message: "write hf://org/name, hf://org/name@revision or hf://org/name@revision/file.gguf",
    holds: (source) => !source.startsWith("hf://") || isHf.test(source),
  },
]);

export const model = withRules(
  z.strictObject({
    source: modelSource.describe("Where the model lies, such as hf://org/name or pvc://claim/path."),
    revision: withRules(z.string().max(128), [
      {
        cel: `self.matches('^${REVISION}$')`,
        message: 'write a branch, tag or commit of letters, digits, ".", "_" and "-"',
        holds: (revision) => isRevision.test(revision),
      },
    ])
      .optional()
      .describe("Branch, tag or commit of an hf:// source."),
    auth: z
      .strictObject({
        secretName: objectName("a Secret of this namespace"),
        key: z.string().min(1).max(253).default("token").describe("Entry of the Secret."),
      })
      .optional()
      .describe("Secret that opens the source; only pods mount it."),
  }),
  [
    {
      cel: "!has(self.revision) || self.source.startsWith('hf://')",
      message: "a revision belongs to an hf:// source: remove it, or write an hf:// source",
      holds: ({ revision, source }) => revision === undefined || source.startsWith("hf://"),
      at: "revision",
    },
    {
      cel: "!has(self.revision) || !self.source.contains('@')",
      message: "the source names a revision after @ already: keep one of the two",
      holds: ({ revision, source }) => revision === undefined || !source.includes("@"),
      at: "revision",
    },
    {
      cel: "!has(self.auth) || !self.source.startsWith('builtin://')",
      message: "a builtin:// model needs no secret: remove auth",
      holds: ({ auth, source }) => auth === undefined || !source.startsWith("builtin://"),
      at: "auth",
    },
  ],
);
export type ModelWish = z.infer<typeof model>;

export const QUANTISATIONS = [
  "auto",
  "F32",
  "F16",
  "BF16",
  "FP8",
  "Q8_0",
  "Q4_0",
  "Q4_1",
  "Q4_K_S",
  "Q4_K_M",
  "Q5_K_S",
  "Q5_K_M",
  "Q6_K",
] as const;

const format = z
  .strictObject({
    container: z.enum(["auto", "safetensors", "gguf"]).default("auto"),
    quantisation: z.enum(QUANTISATIONS).default("auto"),
  })
  .prefault({})
  .describe("What the weights must be; auto takes what the source has. Nothing is converted.");

const size = z.int().min(1).max(RANKS_MAX).optional();

const parallelism = withRules(
  z.strictObject({
    tp: size.describe("Ranks that attention is cut over."),
    dp: size.describe("Copies of attention in a stage."),
    ep: size.describe("Slots that whole experts are dealt to."),
    etp: size.describe("Ranks that one expert is cut over."),
    pp: size.describe("Stages."),
  }),
  [
    {
      cel: "!(has(self.tp) && has(self.dp) && has(self.ep) && has(self.etp)) || self.tp * self.dp == self.ep * self.etp",
      message: "tp x dp and ep x etp are the same ranks: make the products equal, or leave one size out",
      holds: ({ tp, dp, ep, etp }) =>
        tp === undefined || dp === undefined || ep === undefined || etp === undefined || tp * dp === ep * etp,
    },
    {
      cel: `(has(self.tp) ? self.tp : 1) * (has(self.dp) ? self.dp : 1) * (has(self.pp) ? self.pp : 1) <= ${RANKS_MAX}`,
      message: `tp x dp x pp may be ${RANKS_MAX} ranks at most: write smaller sizes and more replicas`,
      holds: ({ tp = 1, dp = 1, pp = 1 }) => tp * dp * pp <= RANKS_MAX,
    },
  ],
).describe("Sizes that are fixed; those left out are the planner's choice. Pins are checked, never overridden.");
export type Parallelism = z.infer<typeof parallelism>;

const autoscale = withRules(
  z.strictObject({
    min: z.int().min(0).max(REPLICAS_MAX).default(1).describe("0: may sleep; the next request wakes it."),
    max: z.int().min(1).max(REPLICAS_MAX),
    targets: withRules(
      z.strictObject({
        queue: z.int().min(1).max(100_000).optional().describe("Waiting requests for each replica."),
        ttftMs: z.int().min(1).max(MILLIS_MAX).optional(),
        itlMs: z.int().min(1).max(MILLIS_MAX).optional(),
      }),
      [
        {
          cel: "has(self.queue) || has(self.ttftMs) || has(self.itlMs)",
          message: "write at least one of queue, ttftMs and itlMs",
          holds: ({ queue, ttftMs, itlMs }) => (queue ?? ttftMs ?? itlMs) !== undefined,
        },
      ],
    ),
  }),
  [
    {
      cel: "self.min <= self.max",
      message: "min is above max: write a min of at most max",
      holds: ({ min, max }) => min <= max,
      at: "min",
    },
  ],
);
export type Autoscale = z.infer<typeof autoscale>;

const slo = z
  .strictObject({
    ttftMs: z.int().min(1).max(MILLIS_MAX).optional().describe("Time to the first token."),
    itlMs: z.int().min(1).max(MILLIS_MAX).optional().describe("Time between tokens."),
    contextTokens: z
      .int()
      .min(1)
      .max(CONTEXT_MAX)
      .optional()
      .describe("Tokens one sequence may have; left out: what the model allows, lowered to what fits."),
    concurrency: z.int().min(1).max(CONCURRENCY_MAX).default(16).describe("Sequences of one replica at once."),
  })
  .prefault({});

const kvCache = z
  .strictObject({
    dtype: z.enum(["auto", "bf16", "fp8"]).default("auto"),
    fraction: z.number().gt(0).max(1).optional().describe("Share of a GPU's memory for KV; left out: what slo needs."),
    offload: z.strictObject({ hostMemory: quantity }).optional().describe("Host memory of each pod for cold blocks."),
  })
  .prefault({});

const experts = withRules(
  z
    .strictObject({
      redundant: z.int().min(0).max(1024).default(0).describe("Copies of busy experts in each layer."),
      balancing: z.enum(["none", "measured"]).default("none").describe("measured: experts move by their load."),
    })
    .prefault({}),
  [
    {
      cel: "!has(self.redundant) || self.redundant == 0 || self.balancing == 'measured'",
      message: "which experts are busy is measured: write balancing: measured, or leave redundant out",
      holds: ({ redundant, balancing }) => redundant === 0 || balancing === "measured",
      at: "balancing",
    },
  ],
);

const speculation = withRules(
  z
    .strictObject({
      draftPool: objectName("a DraftPool of this namespace").optional(),
      method: z.enum(["none", "lookup", "mtp", "eagle"]).optional().describe("Guesses without a pool."),
      lossless: z
        .enum(["L1", "L2"])
        .default("L1")
        .describe("L1: same tokens for the same logits. L2: same bits whatever else is in the batch."),
    })
    .prefault({}),
  [
    {
      cel: "!has(self.draftPool) || !has(self.method)",
      message: "write draftPool or method, not both",
      holds: ({ draftPool, method }) => draftPool === undefined || method === undefined,
      at: "method",
    },
  ],
);

export const gpu = withRules(
  z.strictObject({
    product: labelValue.optional().describe("Such as H200; left out: any that fits."),
    count: z.int().min(1).max(RANKS_MAX).optional().describe("GPUs of one replica; left out: the planner's choice."),
    nodeSelector: labelMap().optional(),
    tolerations: tolerations.optional(),
    topology: z
      .strictObject({
        nodes: z.int().min(1).max(RANKS_MAX).optional().describe("Nodes that one replica is spread over."),
        within: z.enum(["any", "zone", "nvlink"]).default("any").describe("What all GPUs of a replica share."),
      })
      .optional(),
  }),
  [
    {
      cel: "!has(self.count) || !has(self.topology) || !has(self.topology.nodes) || self.count % self.topology.nodes == 0",
      message: "count does not spread evenly over topology.nodes: write a multiple of it",
      holds: ({ count, topology }) =>
        count === undefined || topology?.nodes === undefined || count % topology.nodes === 0,
      at: "count",
    },
  ],
);
export type GpuWish = z.infer<typeof gpu>;

const rollout = z
  .strictObject({
    kind: z.enum(["surge", "inPlace"]).default("surge").describe("surge: new groups first; inPlace: old ones first."),
    drainTimeout: duration.default("5m").describe("How long streams of an old group may run on."),
  })
  .prefault({});

const fields = z.strictObject({
  model,
  format,
  parallelism: parallelism.optional(),
  replicas: z.int().min(0).max(REPLICAS_MAX).default(1),
  autoscale: autoscale.optional().describe("Replicas by load; status.targetReplicas says how many."),
  slo,
  kvCache,
  experts,
  speculation,
  gpu: gpu.optional(),
  rollout,
  priority: z.int().min(-1000).max(1000).default(0).describe("Who gets GPUs first; the higher, the sooner."),
  podPatch: podPatch.optional(),
});

const rules: readonly Rule<z.output<typeof fields>>[] = [
  {
    cel:
      "!has(self.gpu) || !has(self.gpu.count) || !has(self.parallelism) || !has(self.parallelism.tp) || " +
      "!has(self.parallelism.dp) || self.gpu.count == self.parallelism.tp * self.parallelism.dp * " +
      "(has(self.parallelism.pp) ? self.parallelism.pp : 1)",
    message: "gpu.count is tp x dp x pp of parallelism: write that product, or leave gpu.count out",
    holds: ({ gpu: wish, parallelism: pins }) =>
      wish?.count === undefined ||
      pins?.tp === undefined ||
      pins.dp === undefined ||
      wish.count === pins.tp * pins.dp * (pins.pp ?? 1),
    at: "gpu.count",
  },
  {
    cel:
      "!has(self.gpu) || !has(self.gpu.count) || !has(self.parallelism) || !has(self.parallelism.ep) || " +
      "!has(self.parallelism.etp) || self.gpu.count == self.parallelism.ep * self.parallelism.etp * " +
      "(has(self.parallelism.pp) ? self.parallelism.pp : 1)",
    message: "gpu.count is ep x etp x pp of parallelism: write that product, or leave gpu.count out",
    holds: ({ gpu: wish, parallelism: pins }) =>
      wish?.count === undefined ||
      pins?.ep === undefined ||
      pins.etp === undefined ||
      wish.count === pins.ep * pins.etp * (pins.pp ?? 1),
    at: "gpu.count",
  },
];

export const modelDeploymentEdits: readonly EditRule<z.output<typeof fields>>[] = [
  {
    cel: "!has(self.autoscale) || !has(oldSelf.autoscale) || self.replicas == oldSelf.replicas",
    message: "autoscale decides the replicas: edit autoscale.min and autoscale.max, or remove autoscale first",
    holds: (next, before) =>
      next.autoscale === undefined || before.autoscale === undefined || next.replicas === before.replicas,
    at: "replicas",
  },
];

export const modelDeploymentSpec = withRules(fields, rules, modelDeploymentEdits);
export type ModelDeploymentSpec = z.infer<typeof modelDeploymentSpec>;
export type ModelDeploymentSpecInput = z.input<typeof modelDeploymentSpec>;

const NOTICES_MAX = 64;
/** Things the controller says about single fields: they have no effect yet, or a dry-run create was refused. */
export const notices = z
  .array(
    z.object({
      field: z.string().max(256),
      kind: z.enum(["NotYet", "Refused", "Needed"]),
      message: z.string().max(2048),
    }),
  )
  .max(NOTICES_MAX)
  .meta({ "x-kubernetes-list-type": "atomic" });
export type Notice = z.infer<typeof notices>[number];

export const modelDeploymentStatus = z.object({
  observedGeneration: count.optional(),
  phase: phase.optional(),
  cause: cause.optional(),
  conditions: conditions.optional(),
  model: z
    .object({
      source: z.string().max(SOURCE_MAX).describe("Canonical; a branch is replaced by its commit."),
      digest: z.string().max(128),
      format: z.string().max(64),
      family: z.string().max(64),
      parameters: count,
    })
    .optional(),
  plan: z.string().max(64).optional().describe("The cut in short, such as tp16·ep16·2x."),
  planName: z.string().max(253).optional().describe("The ShardPlan that is wanted."),
  revision: z.string().max(64).optional(),
  selector: z.string().max(1024).optional().describe("Pods of this deployment, for the scale subresource."),
  replicas: count.optional().describe("ReplicaGroups that exist."),
  readyReplicas: count.optional(),
  nextOrdinal: count.optional().describe("Ordinals of ReplicaGroups below it have been used."),
  targetReplicas: count.optional().describe("What the autoscaler wants."),
  ready: z.string().max(32).optional().describe("Ready ranks of wanted ones, such as 16/16."),
  readyRanks: count.optional(),
  ranks: count.optional(),
  tokensPerSecond: z.number().min(0).optional(),
  throughput: z.string().max(32).optional().describe("tokensPerSecond as the column shows it."),
  eta: z.string().max(32).optional().describe("Until it serves, such as 3m20s."),
  updated: z.string().max(64).optional().describe("What a rollout does now, such as 2 of 4 replaced."),
  speculation: z
    .object({ active: z.boolean(), pool: z.string().max(253).optional(), detail: z.string().max(1024) })
    .optional(),
  notices: notices.optional(),
});
export type ModelDeploymentStatus = z.infer<typeof modelDeploymentStatus>;
