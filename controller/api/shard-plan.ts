// ShardPlan as a resource: one for each revision, written by the controller, its spec never changed. Owns the form in which
// a plan is stored and the way back; holds the cut without nodes and without tensors: byte ranges follow from the model's
// headers and the shard rules, and whoever needs them recomputes them (shardsOf of controller/model).
//
//   F1  what toResource stores and restorePlan is given back with the same model is the same plan, field by field.
//   F2  a stored plan is never bent to a newer controller: another digest or other shard rules are refused.
//   F3  no plan is stored above SHARD_PLAN_BYTES_MAX.
import { z } from "zod";
import { FaultError, invalid } from "../../proto/fault.ts";
import {
  LedgerClass,
  type ModelSpec,
  ModelSpec as ModelSpecMessage,
  type RankLedger,
  type RankShard,
  type Reason,
  Reason_Kind,
  type ShardPlan,
  shardRuleToJSON,
  TokenizerSpec,
  tensorRoleToJSON,
} from "../../proto/gen/muster/v1/plan.ts";
import type { Fault } from "../../proto/gen/muster/v1/worker.ts";
import { conditions } from "./conditions.ts";
import { count, listBy, timestamp } from "./fields.ts";
import { RANKS_MAX } from "./model-deployment.ts";
import { type EditRule, withRules } from "./rules.ts";
import { vocabulary, vocabularyHash, vocabularyOf } from "./vocabulary.ts";

const LEDGERS_MAX = RANKS_MAX;
const REASONS_MAX = 64;
const RULES_MAX = 64;
const DIGEST_MAX = 128;
const NAME_MAX = 253;

const size = z.int().min(1).max(RANKS_MAX);
const text = (max: number) => z.string().max(max);

const model = z.object({
  name: text(1024),
  family: text(64),
  source: text(1024).describe("Canonical; a branch is replaced by its commit."),
  digest: text(DIGEST_MAX).describe("sha256 over headers, sizes and etags."),
  format: text(64),
  parameters: count,
  parametersActive: count,
  contextTokens: count.describe("The model's own limit."),
  vocabSize: count,
  vocabulary: vocabulary.optional().describe("Equal vocabularies may speculate together."),
  hasChatTemplate: z.boolean(),
  planOnly: text(1024).optional().describe("Why it can be planned but not served."),
  projected: z.boolean(),
});

const cut = z.object({ world: size, tp: size, dp: size, ep: size, etp: size, pp: size });

const ledger = z.object({
  ranks: z
    .array(z.object({ first: z.int().min(0), last: z.int().min(0) }))
    .min(1)
    .max(RANKS_MAX)
    .meta({ "x-kubernetes-list-type": "atomic" })
    .describe("Ranks that hold exactly these bytes, both ends included."),
  bytes: z
    .object({
      embedding: count.optional(),
      attention: count.optional(),
      dense: count.optional(),
      experts: count.optional(),
      shared: count.optional(),
      norms: count.optional(),
      head: count.optional(),
      kv: count.optional(),
      activations: count.optional(),
      communication: count.optional(),
      reserve: count.optional(),
    })
    .describe("By class; a class that is left out takes nothing."),
  used: count,
  capacity: count,
});

const REASON_KINDS = ["Chosen", "RunnerUp", "Limit", "Refused", "Remedy", "Note"] as const;

const REASON_TEXT_MAX = 2048;
const reason = z.object({ kind: z.enum(REASON_KINDS), code: text(64), text: text(REASON_TEXT_MAX) });

const prediction = z.object({
  ttftMs: z.number().min(0),
  itlMs: z.number().min(0),
  tokensPerSecond: z.number().min(0).describe("Of the whole group at this concurrency."),
  concurrency: count,
  bound: z.enum(["memory", "compute", "communication"]),
  calibration: z.number().gt(0).max(10).optional().describe("Share of the roofline that it counts on."),
});

const fields = z.object({
  revision: text(64).describe("Hash over model, cut and sizes; groups of one revision give the same tokens."),
  model,
  cut,
  workers: size.describe("Nodes of one group."),
  contextTokens: count,
  kv: z.object({ blockTokens: count, blocks: count.describe("For each rank, the padding block included.") }),
  expertCopies: count
    .optional()
    .describe("Of each layer, besides the first of each expert; the ledgers hold room for them."),
  shardRules: z
    .array(z.object({ role: text(64), rule: text(64) }))
    .max(RULES_MAX)
    .meta({ "x-kubernetes-list-type": "atomic" })
    .describe("How each kind of tensor is cut; with the headers they give every byte range."),
  ledgers: z.array(ledger).max(LEDGERS_MAX).meta({ "x-kubernetes-list-type": "atomic" }),
  reasons: z.array(reason).max(REASONS_MAX).meta({ "x-kubernetes-list-type": "atomic" }),
  prediction,
  image: text(512).describe("Worker image by digest."),
  podTemplateDigest: text(DIGEST_MAX).describe("Over the pods made from this plan."),
});

export const shardPlanEdits: readonly EditRule<z.output<typeof fields>>[] = [
  {
    cel: "self == oldSelf",
    message: "a ShardPlan never changes: change the ModelDeployment and the controller writes another plan",
    holds: (next, before) => JSON.stringify(next) === JSON.stringify(before),
  },
];

export const shardPlanSpec = withRules(fields, [], shardPlanEdits);
export type ShardPlanSpec = z.infer<typeof shardPlanSpec>;
export type ShardPlanSpecInput = z.input<typeof shardPlanSpec>;

/** Of a plan with more groups those whose maps changed last are shown. */
export const EXPERT_MAPS_MAX = 256;

const expertMap = z.object({
  group: text(NAME_MAX).min(1).describe("ReplicaGroup of this namespace."),
  incarnation: count,
  version: count.describe("0: the plan's own, with which every incarnation begins."),
  digest: text(DIGEST_MAX),
  since: timestamp,
});
export type ExpertMapShown = z.infer<typeof expertMap>;

const measured = z.object({
  at: timestamp.describe("When tokensPerSecond was."),
  ttftMs: z
    .number()
    .min(0)
    .optional()
    .describe("90th percentile at gateways, at latencyConcurrency; left out: none told."),
  itlMs: z.number().min(0).optional().describe("Likewise."),
  latencyConcurrency: count.optional().describe("Sequences of a group at once, the most of which gateways told."),
  tokensPerSecond: z.number().min(0).optional().describe("The most of one group, over ten seconds."),
  concurrency: count.optional().describe("Sequences of that group at once, on average."),
  calibration: z
    .number()
    .gt(0)
    .max(10)
    .optional()
    .describe("Share of the roofline, at the predicted concurrency; the next plan is predicted with it."),
});

export const shardPlanStatus = z.object({
  observedGeneration: count.optional(),
  conditions: conditions.optional(),
  expertMaps: listBy(expertMap, "group", EXPERT_MAPS_MAX)
    .optional()
    .describe(
      "Which copy of which expert lies where in each group; moves with the load of the group, the plan does not.",
    ),
  measured: measured.optional(),
  groups: count.optional().describe("ReplicaGroups that use it."),
});
export type ShardPlanStatus = z.infer<typeof shardPlanStatus>;

// ---- to and from a plan ----

/** Of the spec as JSON: etcd takes 1.5 MB, a reader of many plans should not have to. */
export const SHARD_PLAN_BYTES_MAX = 256 * 1024;

/** What each class of the byte ledger is called, everywhere that people read it. */
export const CLASSES: readonly [LedgerClass, keyof ShardPlanSpec["ledgers"][number]["bytes"]][] = [
  [LedgerClass.EMBEDDING, "embedding"],
  [LedgerClass.ATTENTION, "attention"],
  [LedgerClass.DENSE, "dense"],
  [LedgerClass.EXPERTS, "experts"],
  [LedgerClass.SHARED, "shared"],
  [LedgerClass.NORMS, "norms"],
  [LedgerClass.HEAD, "head"],
  [LedgerClass.KV, "kv"],
  [LedgerClass.ACTIVATIONS, "activations"],
  [LedgerClass.COMMUNICATION, "communication"],
  [LedgerClass.RESERVE, "reserve"],
];

const REASONS: readonly [Reason_Kind, (typeof REASON_KINDS)[number]][] = [
  [Reason_Kind.CHOSEN, "Chosen"],
  [Reason_Kind.RUNNER_UP, "RunnerUp"],
  [Reason_Kind.LIMIT, "Limit"],
  [Reason_Kind.REFUSED, "Refused"],
  [Reason_Kind.REMEDY, "Remedy"],
  [Reason_Kind.NOTE, "Note"],
];

/** What of a stored plan a plan does not hold. `calibration`: what it was predicted with. */
export type Packaging = { image: string; podTemplateDigest: string; calibration?: number };

/** Throws FaultError where the plan is too large to store (F3), and for a plan that the planner cannot have made. */
export function toResource(plan: ShardPlan, packaging: Packaging): ShardPlanSpec {
  const { image, podTemplateDigest, calibration } = packaging;
  const { model: spec, cut: sizes, prediction: predicted, ...rest } = plan;
  if (spec === undefined) throw new Error(`plan ${plan.revision} has no model`);
  const stored = shardPlanSpec.parse({
    revision: rest.revision,
    model: modelResource(spec),
    cut: sizes,
    workers: rest.workers,
    contextTokens: rest.contextTokens,
    kv: { blockTokens: rest.kvBlockTokens, blocks: rest.kvBlocks },
    ...(rest.expertCopies > 0 ? { expertCopies: rest.expertCopies } : {}),
    shardRules: shardRulesOf(spec),
    ledgers: ledgerResources(rest.ledgers),
    reasons: rest.reasons.slice(0, REASONS_MAX).map(reasonResource),
    prediction: calibration === undefined ? predicted : { ...predicted, calibration },
    image,
    podTemplateDigest,
  });
  const bytes = Buffer.byteLength(JSON.stringify(stored));
  if (bytes <= SHARD_PLAN_BYTES_MAX) return stored;
  const detail = `the plan takes ${bytes} bytes stored; at most ${SHARD_PLAN_BYTES_MAX}: use fewer ranks`;
  throw new FaultError(invalid("spec.ledgers", detail, "plan_too_large"));
}

function modelResource(spec: ModelSpec) {
  return {
    name: spec.name,
    family: spec.family,
    source: spec.source,
    digest: spec.digest,
    format: spec.format,
    parameters: Number(spec.parameters),
    parametersActive: Number(spec.parametersActive),
    contextTokens: spec.contextTokens,
    vocabSize: spec.vocabSize,
    vocabulary: spec.tokenizer === undefined ? undefined : vocabularyOf(spec.tokenizer.vocabHash),
    hasChatTemplate: (spec.tokenizer?.chatTemplate ?? "") !== "",
    planOnly: spec.planOnly === "" ? undefined : spec.planOnly,
    projected: spec.projected,
  };
}

/** Each pair once; the same for every layer, whatever the number of tensors. */
function shardRulesOf(spec: ModelSpec): { role: string; rule: string }[] {
  const pairs = new Set(spec.tensors.map(({ role, rule }) => `${tensorRoleToJSON(role)} ${shardRuleToJSON(rule)}`));
  return [...pairs].sort().map((pair) => {
    const [role = "", rule = ""] = pair.split(" ");
    return { role: role.replace("TENSOR_ROLE_", ""), rule: rule.replace("SHARD_RULE_", "") };
  });
}

/** Ranks with the same bytes share an entry: an even cut of a thousand ranks is one of a few lines. */
function ledgerResources(ledgers: readonly RankLedger[]) {
  const entries = new Map<string, { ranks: { first: number; last: number }[]; body: object }>();
  for (const { rank, lines, used, capacity } of ledgers) {
    const held = lines.map(({ class: type, bytes }) => [nameIn(CLASSES, type), Number(bytes)]);
    const body = { bytes: Object.fromEntries(held), used: Number(used), capacity: Number(capacity) };
    const key = JSON.stringify(body);
    const entry = entries.get(key) ?? { ranks: [], body };
    entries.set(key, entry);
    const range = entry.ranks.at(-1);
    if (range !== undefined && range.last === rank - 1) range.last = rank;
    else entry.ranks.push({ first: rank, last: rank });
  }
  return [...entries.values()].map(({ ranks, body }) => ({ ranks, ...body }));
}

function reasonResource({ kind, code, text: said }: Reason) {
  return { kind: nameIn(REASONS, kind), code, text: said.slice(0, REASON_TEXT_MAX) };
}

function nameIn<K, N>(table: readonly [K, N][], key: K): N {
  const found = table.find(([known]) => known === key);
  if (found === undefined) throw new Error(`a plan holds ${String(key)}, which has no name in the API`);
  return found[1];
}

function keyIn<K, N>(table: readonly [K, N][], name: N): K {
  const found = table.find(([, known]) => known === name);
  if (found === undefined) throw new Error(`${String(name)} has no number in the plan`);
  return found[0];
}

/** The plan without what is recomputed: no ranks, and of the model only what is stored. */
export function fromResource(spec: ShardPlanSpec): ShardPlan {
  const { calibration: _, ...prediction } = spec.prediction;
  return {
    revision: spec.revision,
    model: modelOutline(spec.model),
    cut: spec.cut,
    ranks: [],
    ledgers: ledgersOf(spec.ledgers),
    reasons: spec.reasons.map(({ kind, ...said }) => ({ kind: keyIn(REASONS, kind), ...said })),
    prediction,
    workers: spec.workers,
    contextTokens: spec.contextTokens,
    kvBlockTokens: spec.kv.blockTokens,
    kvBlocks: spec.kv.blocks,
    expertCopies: spec.expertCopies ?? 0,
  };
}

function modelOutline(stored: ShardPlanSpec["model"]): ModelSpec {
  const { vocabulary: name, hasChatTemplate: _, planOnly = "", parameters, parametersActive, ...rest } = stored;
  const vocabHash = name === undefined ? undefined : vocabularyHash(name);
  return ModelSpecMessage.create({
    ...rest,
    planOnly,
    parameters: BigInt(parameters),
    parametersActive: BigInt(parametersActive),
    tokenizer: vocabHash === undefined ? undefined : TokenizerSpec.create({ vocabHash }),
  });
}

function ledgersOf(stored: ShardPlanSpec["ledgers"]): RankLedger[] {
  const ledgers: RankLedger[] = [];
  for (const { ranks, bytes, used, capacity } of stored) {
    const lines = CLASSES.flatMap(([type, name]) => {
      const held = bytes[name];
      return held === undefined ? [] : [{ class: type, bytes: BigInt(held) }];
    });
    for (const { first, last } of ranks)
      for (let rank = first; rank <= last; rank++)
        ledgers.push({ rank, lines, used: BigInt(used), capacity: BigInt(capacity) });
  }
  return ledgers.sort((one, other) => one.rank - other.rank);
}

/**
 * The whole plan, as it was before it was stored. `model` has been read again from its headers and `shardsOf` recomputes
 * what each rank holds. A fault where that model is not the one the plan was made for (F2).
 */
export function restorePlan(
  spec: ShardPlanSpec,
  model: ModelSpec,
  shardsOf: (model: ModelSpec, cut: ShardPlanSpec["cut"], workers: number) => RankShard[],
): { kind: "ok"; value: ShardPlan } | { kind: "refused"; fault: Fault } {
  const refuse = (field: string, detail: string, code: string) =>
    ({ kind: "refused", fault: invalid(field, detail, code) }) as const;
  if (model.digest !== spec.model.digest) {
    const detail = `the plan is for headers ${spec.model.digest.slice(0, 12)}, the source now has ${model.digest.slice(0, 12)}`;
    return refuse(
      "spec.model.digest",
      `${detail}: put the old weights back, or let a new revision be planned`,
      "model_changed",
    );
  }
  if (JSON.stringify(shardRulesOf(model)) !== JSON.stringify(spec.shardRules)) {
    const detail = "this controller cuts the model's tensors by other rules than the plan was made with";
    return refuse("spec.shardRules", `${detail}: let a new revision be planned`, "shard_rules_changed");
  }
  return { kind: "ok", value: { ...fromResource(spec), model, ranks: shardsOf(model, spec.cut, spec.workers) } };
}
