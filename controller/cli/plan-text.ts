// What `muster plan -f` prints, for people and as JSON. Pure. Tables and ledgers are those of controller/plan/print.ts; this
// adds where the replicas go.
import type { ShardPlanSpec } from "../api/shard-plan.ts";
import type { KubeObject } from "../kube/api/client.ts";
import type { Foreseen } from "../kube/what-if/what-if.ts";
import type { Placed } from "../kube/what-if/what-if-stage.ts";
import { gigabytes } from "../plan/candidate.ts";
import { planJson, planText } from "../plan/print.ts";
import { tokensText } from "../plan/remedy.ts";
import { planColumn } from "../reconcile/deployment/columns.ts";

export type Foresight = Foreseen & { owner: KubeObject };
/** Nodes by worker; empty where it has no places. */
export type Elsewhere = { group: string; from: readonly string[]; to: readonly string[] };
export type Said = {
  answers: readonly Foresight[];
  elsewhere: readonly Elsewhere[];
  /** Kinds that the cluster does not serve. */
  missing: readonly string[];
  whatIf: readonly string[];
};

type Planned = Extract<Foreseen["outcome"], { kind: "planned" }>;

export function foresightText({ answers, elsewhere, missing, whatIf }: Said): string {
  const lines: string[] = [];
  if (whatIf.length > 0) lines.push(`supposed: ${whatIf.join(", ")}`);
  if (missing.length > 0) lines.push(`the cluster does not serve ${missing.join(", ")}: Muster is not installed there`);
  for (const answer of answers) lines.push(...(lines.length > 0 ? [""] : []), ...answerLines(answer));
  if (elsewhere.length > 0) lines.push("", "other replicas");
  for (const { group, from, to } of elsewhere) {
    const now = to.length === 0 ? "nowhere, it waits" : to.join(", ");
    lines.push(`  ${group}: ${from.length === 0 ? "waiting" : from.join(", ")} -> ${now}`);
  }
  return `${lines.join("\n")}\n`;
}

function answerLines(answer: Foresight): string[] {
  const { owner, outcome, notices } = answer;
  const lines = [titleOf(owner)];
  const table = tableOf(answer);
  if (table !== undefined) lines.push(table.trimEnd());
  switch (outcome.kind) {
    case "refused": {
      const { field, detail } = outcome.fault;
      lines.push(`refused: ${field === "" ? detail : `${field}: ${detail}`}`);
      break;
    }
    case "failed":
      lines.push(`no answer: ${outcome.detail}`);
      break;
    case "infeasible":
      if (table === undefined) lines.push(...infeasibleLines(outcome));
      lines.push("does not fit: nothing would be bound");
      break;
    case "planned":
      if (table === undefined) lines.push(...storedLines(outcome));
      lines.push("", ...placeLines(outcome));
      break;
    default:
      throw new Error(`unreachable: ${JSON.stringify(outcome satisfies never)}`);
  }
  for (const notice of notices) lines.push(`  notice    ${notice}`);
  return lines;
}

const titleOf = ({ kind, metadata }: KubeObject): string => `${kind} ${metadata.namespace}/${metadata.name}`;

/** Undefined where nothing was planned anew. */
function tableOf({ judged }: Foresight): string | undefined {
  if (judged === undefined) return undefined;
  const { model: spec, inventory, wishes, planned } = judged;
  return planText({ spec, inventory, wishes }, planned);
}

function infeasibleLines({ reasons, remedy }: Extract<Foreseen["outcome"], { kind: "infeasible" }>): string[] {
  const lines = reasons.map(({ code, text }) => `  ${code}: ${text}`);
  return remedy === undefined ? lines : [...lines, `  remedy    ${remedy}`];
}

/** A plan that is stored already: what it says of itself. */
function storedLines({ planName, plan }: Planned): string[] {
  const { model, cut, workers, contextTokens, kv, reasons, revision } = plan;
  const fullest = plan.ledgers.toSorted((one, other) => other.used - one.used)[0];
  const bytes = Object.entries(fullest?.bytes ?? {}).filter(([, count]) => (count ?? 0) > 0);
  return [
    `stored as ShardPlan ${planName}: it is not planned anew`,
    `${model.name} (${model.family}, ${model.format}): ${planColumn(cut, 1)}, ${cut.world} ranks on ${workers} nodes`,
    `bytes of rank ${fullest?.ranks[0]?.first ?? 0}, the fullest`,
    ...bytes.map(([name, count]) => `  ${name.padEnd(14)}${gigabytes(count ?? 0)}`),
    `  ${"used".padEnd(14)}${gigabytes(fullest?.used ?? 0)}`,
    `  ${"of".padEnd(14)}${gigabytes(fullest?.capacity ?? 0)}`,
    `plan ${revision.slice(0, 12)}: context ${tokensText(contextTokens)}, ${kv.blocks} KV blocks of ${kv.blockTokens} tokens a rank`,
    ...reasons.map(({ kind, code, text }) => `  ${kind.toLowerCase().padEnd(10)}${code}: ${text}`),
  ];
}

function placeLines({ placed, waiting, wanted, plan }: Planned): string[] {
  const lines = ["places"];
  for (const group of placed) lines.push(...seatLines(group));
  for (const { group, text } of waiting) lines.push(`  ${group} waits: ${text}`);
  const cut = planColumn(plan.cut, wanted);
  if (wanted === 0) return [...lines, `${cut}: no replicas are wanted`];
  const isShort = waiting.length > 0 || placed.length < wanted;
  return [...lines, `${isShort ? "short" : "fits"}: ${cut}, ${placed.length} of ${wanted} replicas have places`];
}

function seatLines({ group, seats, isNew }: Placed): string[] {
  const told = `  ${group}${isNew ? "" : " (bound already)"}`;
  return [
    told,
    ...seats.map(({ worker, node, devices, firstRank }) => {
      const last = firstRank + devices - 1;
      const ranks = devices === 1 ? `rank ${firstRank}` : `ranks ${firstRank}-${last}`;
      return `    worker ${worker} -> ${node}: ${devices} GPU${devices === 1 ? "" : "s"} (${ranks})`;
    }),
  ];
}

// ---- data ----

/** `owners`: in the order of the file. `places[].workers` are the nodes that the controller binds. */
export function foresightJson({ answers, elsewhere, missing, whatIf }: Said): unknown {
  return { whatIf, missing, owners: answers.map(answerJson), elsewhere };
}

function answerJson({ owner, outcome, judged, notices }: Foresight): unknown {
  const { namespace, name } = owner.metadata;
  const named = { kind: owner.kind, namespace, name, notices };
  const asked = judged && { spec: judged.model, inventory: judged.inventory, wishes: judged.wishes };
  const planning = asked === undefined || judged === undefined ? null : planJson(asked, judged.planned);
  switch (outcome.kind) {
    case "refused": {
      const { field, detail, code } = outcome.fault;
      return { ...named, outcome: outcome.kind, fault: { field, detail, code }, planning };
    }
    case "failed":
      return { ...named, outcome: outcome.kind, detail: outcome.detail, planning };
    case "infeasible":
      return { ...named, outcome: outcome.kind, reasons: outcome.reasons, remedy: outcome.remedy ?? null, planning };
    case "planned":
      return { ...named, ...placesJson(outcome), planning };
    default:
      throw new Error(`unreachable: ${JSON.stringify(outcome satisfies never)}`);
  }
}

function placesJson({ planName, plan, isStored, wanted, placed, waiting }: Planned) {
  const isShort = waiting.length > 0 || placed.length < wanted;
  return {
    outcome: isShort ? "short" : "fits",
    plan: planOf(planName, plan, isStored),
    wanted,
    places: placed.map(({ group, seats, isNew, plan: of }) => ({ group, plan: of, isNew, workers: seats })),
    waiting,
  };
}

function planOf(
  name: string,
  { revision, cut, workers, ledgers, reasons, prediction }: ShardPlanSpec,
  isStored: boolean,
) {
  return { name, isStored, revision, cut, workers, ledgers, reasons, prediction };
}
