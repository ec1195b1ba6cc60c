// What an owner of groups (ModelDeployment or DraftPool) asks for, as the rollout sees it: the question to the planner, what
// its pods are made from, and the names that follow. Pure. Owns what makes a new revision and what does not.
//
//   W1  the same fields ask the same question under the same name, whichever controller reads them: a field that is added
//       later is left out of the hash while it is at its default, so that a newer controller plans nothing anew.
//   W2  replicas, latency targets, priority, rollout and autoscale are no part of it: changing them plans nothing anew.
import { createHash } from "node:crypto";
import { type DeploymentWish, deploymentWish, type PoolWish, poolWish, type Scale } from "../../api/mapping.ts";
import { GROUP } from "../../api/meta.ts";
import type { ModelDeploymentSpec, Notice } from "../../api/model-deployment.ts";
import type { DraftPool, ModelDeployment } from "../../api/parse.ts";
import type { PodPatch } from "../../api/pod-patch.ts";

export type OwnerKind = "ModelDeployment" | "DraftPool";

/** On a ShardPlan: the hash of the question it answers. */
export const QUESTION = `${GROUP}/question`;
/** On an owner: any new text asks the planner again, once. */
export const REPLAN = `${GROUP}/replan`;
/** On a draining group: its streams end then at the latest. */
export const DRAIN_UNTIL = `${GROUP}/drain-until`;
/** On a group: the DraftPool of its namespace that guesses for it. */
export const DRAFT_POOL = `${GROUP}/draft-pool`;

export type Question = {
  source: DeploymentWish["source"];
  format: DeploymentWish["format"];
  plan: DeploymentWish["plan"];
  kvFraction: number | undefined;
  nodes: DeploymentWish["nodes"];
  /** Replicas that are to fit beside each other where they can; no part of the hash (W2). */
  replicas: number;
  hash: string;
};

export type OwnerWish = {
  kind: OwnerKind;
  question: Question;
  /** Over what the pods are made from besides the plan. */
  podTemplateDigest: string;
  /** Its pods are not the installation's alone. */
  hasPodPatch: boolean;
  /** Name of the ShardPlan that is wanted. */
  planName: string;
  scale: Scale;
  rollout: { kind: "surge" | "inPlace"; drainMs: number };
  slo: DeploymentWish["slo"];
  draftPool: string | undefined;
  /** Of a DraftPool: which it may serve. */
  vocabularies: readonly string[] | undefined;
  notYet: readonly Notice[];
};

/** Drafts hold no stream that a person waits for. */
export const POOL_DRAIN_MS = 10_000;
const NAME_HASH = 10;
/** Ordinals make the names unique; this part is for people. Host names of pods have 63 characters in all. */
const GROUP_HASH = 5;
const QUESTION_HASH = 32;

export function wishOfDeployment({ metadata, spec }: ModelDeployment): OwnerWish {
  const wish = deploymentWish(spec);
  const again = metadata.annotations?.[REPLAN];
  return {
    kind: "ModelDeployment",
    ...named(metadata.name, {
      question: { ...wish, nodes: withPatch(wish.nodes, wish.podPatch), replicas: replicasOf(spec), hash: "" },
      podPatch: wish.podPatch,
      draftPool: wish.draftPool,
      again,
    }),
    hasPodPatch: wish.podPatch !== undefined,
    scale: wish.scale,
    rollout: wish.rollout,
    slo: wish.slo,
    draftPool: wish.draftPool,
    vocabularies: undefined,
    notYet: wish.notYet,
  };
}

export function wishOfPool({ metadata, spec }: DraftPool): OwnerWish {
  const wish: PoolWish = poolWish(spec);
  const question: Question = {
    source: wish.source,
    format: { container: "auto", quantisation: "auto" },
    plan: wish.plan,
    kvFraction: undefined,
    nodes: withPatch(wish.nodes, wish.podPatch),
    replicas: Math.max(1, wish.replicas),
    hash: "",
  };
  const again = metadata.annotations?.[REPLAN];
  return {
    kind: "DraftPool",
    ...named(metadata.name, { question, podPatch: wish.podPatch, draftPool: undefined, again }),
    hasPodPatch: wish.podPatch !== undefined,
    scale: { kind: "fixed", replicas: wish.replicas },
    rollout: { kind: "surge", drainMs: POOL_DRAIN_MS },
    slo: { ttftMs: undefined, itlMs: undefined },
    draftPool: undefined,
    vocabularies: wish.vocabularies,
    notYet: wish.notYet,
  };
}

/** Pods of the patch go where these let them: the ledger asks by the same. */
function withPatch(nodes: Question["nodes"], patch: PodPatch | undefined): Question["nodes"] {
  return { ...nodes, tolerations: [...nodes.tolerations, ...(patch?.tolerations ?? [])] };
}

function replicasOf(spec: ModelDeploymentSpec): number {
  return Math.max(1, spec.autoscale?.min ?? spec.replicas);
}

type Parts = {
  question: Question;
  podPatch: PodPatch | undefined;
  draftPool: string | undefined;
  again: string | undefined;
};

function named(owner: string, parts: Parts): Pick<OwnerWish, "question" | "podTemplateDigest" | "planName"> {
  const { source, format, plan, kvFraction, nodes, replicas } = parts.question;
  const { container, quantisation } = format;
  const asked = {
    source: source.url,
    secret: source.secret,
    container: unless("auto", container),
    quantisation: unless("auto", quantisation),
    contextTokens: plan.contextTokens,
    concurrency: plan.concurrency,
    expertCopies: unless(0, plan.expertCopies),
    pins: plan.pins,
    kvFraction,
    product: nodes.product,
    nodeSelector: nodes.nodeSelector,
    tolerations: nodes.tolerations,
    within: unless("any", nodes.within),
    again: parts.again,
  };
  const hash = hashOf(asked, QUESTION_HASH);
  const podPatch = parts.podPatch && { ...parts.podPatch, ipcLock: parts.podPatch.ipcLock || undefined };
  const podTemplateDigest = hashOf({ podPatch, draftPool: parts.draftPool }, 64);
  return {
    question: { source, format, plan, kvFraction, nodes, replicas, hash },
    podTemplateDigest,
    planName: `${owner}-${hashOf({ hash, podTemplateDigest }, NAME_HASH)}`,
  };
}

/** One replica, for ever: ordinals are not used twice. */
export function groupName(owner: string, planName: string, ordinal: number): string {
  return `${owner}-${planName.slice(owner.length + 1, owner.length + 1 + GROUP_HASH)}-${ordinal}`;
}

const unless = <T>(standard: T, value: T): T | undefined => (value === standard ? undefined : value);

function hashOf(value: unknown, digits: number): string {
  return createHash("sha256").update(canonical(value)).digest("hex").slice(0, digits);
}

/** JSON with sorted keys, without what is undefined or empty (W1). */
export function canonical(value: unknown): string {
  return JSON.stringify(pruned(value)) ?? "null";
}

function pruned(value: unknown): unknown {
  if (Array.isArray(value)) return value.length === 0 ? undefined : value.map((item) => pruned(item) ?? null);
  if (typeof value !== "object" || value === null) return value;
  const kept = Object.entries(value)
    .map(([key, item]) => [key, pruned(item)] as const)
    .filter(([, item]) => item !== undefined)
    .sort(([one], [other]) => (one < other ? -1 : 1));
  return kept.length === 0 ? undefined : Object.fromEntries(kept);
}
