// A plan on paper: the table of `muster plan`, and the same as data. Pure; the same plan prints the same text.
import {
  LedgerClass,
  type ModelSpec,
  type RankLedger,
  type Reason,
  Reason_Kind,
  ShardPlan,
} from "../../proto/gen/muster/v1/plan.ts";
import { CLASSES } from "../api/shard-plan.ts";
import { type Candidate, cutName, gigabytes, kvBytesOfModel } from "./candidate.ts";
import { type Inventory, inventoryName } from "./hardware.ts";
import type { Planned, Table } from "./plan.ts";
import { tokensText } from "./remedy.ts";
import { inventoryKind, type Wishes } from "./wishes.ts";

export type Asked = { spec: ModelSpec; inventory: Inventory; wishes: Wishes };

const REASON_NAMES: readonly [kind: Reason_Kind, name: string][] = [
  [Reason_Kind.CHOSEN, "chosen"],
  [Reason_Kind.RUNNER_UP, "runner-up"],
  [Reason_Kind.LIMIT, "limit"],
  [Reason_Kind.REFUSED, "refused"],
  [Reason_Kind.REMEDY, "remedy"],
  [Reason_Kind.NOTE, "note"],
];

const reasonName = (kind: Reason_Kind): string => REASON_NAMES.find(([known]) => known === kind)?.[1] ?? "note";
const className = (type: LedgerClass): string => CLASSES.find(([known]) => known === type)?.[1] ?? "other";

/** The whole answer, ending in a line break. */
export function planText(asked: Asked, planned: Planned): string {
  const { spec } = asked;
  const lines = [...heading(asked), "", ...tableLines(spec, planned.table), ...refusedLines(spec, planned.table)];
  if (planned.kind === "feasible") {
    const { plan } = planned;
    lines.push("", ...ledgerLines(planned.table.candidates[0]));
    const blocks = `${plan.kvBlocks} KV blocks of ${plan.kvBlockTokens} tokens a rank`;
    lines.push("", `plan ${plan.revision.slice(0, 12)}: context ${tokensText(plan.contextTokens)}, ${blocks}`);
    lines.push(...plan.reasons.map(reasonLine));
  } else {
    lines.push("", "nothing fits", ...planned.reasons.map(reasonLine), ...infeasibleNotes(spec).map(reasonLine));
    lines.push(reasonLine(remedyReason(planned)));
  }
  return `${lines.join("\n")}\n`;
}

function remedyReason(planned: Extract<Planned, { kind: "infeasible" }>): Reason {
  const text = planned.remedy === undefined ? "no single change was found that fits." : `${planned.remedy.text}.`;
  return { kind: Reason_Kind.REMEDY, code: planned.remedy?.kind ?? "none", text };
}

function infeasibleNotes(spec: ModelSpec): Reason[] {
  const notes: Reason[] = [];
  if (spec.projected)
    notes.push({
      kind: Reason_Kind.NOTE,
      code: "projected",
      text: "the configuration is a projection: this model was never released.",
    });
  return notes;
}

function heading({ spec, inventory, wishes }: Asked): string[] {
  const billions = (count: bigint): string => {
    const millions = Number(count) / 1e6;
    return millions >= 1000 ? `${(millions / 1000).toFixed(2)} B` : `${millions.toFixed(2)} M`;
  };
  const marks = [spec.projected ? "PROJECTION" : "", spec.planOnly === "" ? "" : "PLAN ONLY"].filter(
    (mark) => mark !== "",
  );
  const mark = marks.length === 0 ? "" : `  [${marks.join(", ")}]`;
  const context = wishes.contextTokens === undefined ? "as fits" : tokensText(wishes.contextTokens);
  const kv = gigabytes(kvBytesOfModel(spec, inventoryKind(inventory)));
  return [
    `${spec.name} (${spec.family}, ${spec.format})${mark}`,
    `${billions(spec.parameters)} parameters, ${billions(spec.parametersActive)} for each token, KV ${kv} for each token`,
    `on ${inventoryName(inventory)}; context ${context}, ${wishes.concurrency} sequences at once`,
    `predicted at half of the context, a prompt of at most 1024 tokens, roofline x ${wishes.calibration}`,
  ];
}

// ---- table ----

function sums(ledger: RankLedger, ...classes: LedgerClass[]): number {
  let sum = 0;
  for (const line of ledger.lines) if (classes.includes(line.class)) sum += Number(line.bytes);
  return sum;
}

function fullestRank(candidate: Candidate): RankLedger | undefined {
  return candidate.ledgers.toSorted((one, other) => Number(other.used - one.used))[0];
}

const HEADER = [
  "CUT",
  "RANKS",
  "NODES",
  "VOCAB",
  "ATTN",
  "FFN",
  "EXPERTS",
  "KV",
  "WORK",
  "RESERVE",
  "USED",
  "OF",
  "FITS",
  "TTFT",
  "ITL",
  "TOK/S",
];

/** Bytes are those of the fullest rank. Predictions only where the cut fits: nothing else could run. */
function row(spec: ModelSpec, candidate: Candidate): string[] {
  const { cut, workers, prediction, fits } = candidate;
  const ledger = fullestRank(candidate) ?? { rank: 0, lines: [], used: 0n, capacity: 0n };
  const bytes = (...classes: LedgerClass[]): string => {
    const sum = sums(ledger, ...classes);
    return sum === 0 ? "-" : gigabytes(sum);
  };
  return [
    cutName(cut, spec),
    `${cut.world}`,
    `${workers}`,
    bytes(LedgerClass.EMBEDDING, LedgerClass.HEAD),
    bytes(LedgerClass.ATTENTION, LedgerClass.NORMS),
    bytes(LedgerClass.DENSE, LedgerClass.SHARED),
    bytes(LedgerClass.EXPERTS),
    bytes(LedgerClass.KV),
    bytes(LedgerClass.ACTIVATIONS, LedgerClass.COMMUNICATION),
    bytes(LedgerClass.RESERVE),
    gigabytes(Number(ledger.used)),
    gigabytes(Number(ledger.capacity)),
    fits ? "yes" : "no",
    fits ? milliseconds(prediction.ttftMs) : "-",
    fits ? milliseconds(prediction.itlMs) : "-",
    fits ? figure(prediction.tokensPerSecond) : "-",
  ];
}

const figure = (value: number): string => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));
const milliseconds = (ms: number): string => `${figure(ms)} ms`;

function tableLines(spec: ModelSpec, table: Table): string[] {
  if (table.candidates.length === 0) return ["no cut can be looked at"];
  return aligned([HEADER, ...table.candidates.map((candidate) => row(spec, candidate))]);
}

function aligned(rows: readonly string[][]): string[] {
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((cells) => cells[column]?.length ?? 0)));
  return rows.map((cells) =>
    cells
      .map((cell, column) => (column === 0 ? cell.padEnd(widths[0] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join("  ")
      .trimEnd(),
  );
}

/** One line for each cause, with the cuts that it refuses. */
function refusedLines(spec: ModelSpec, table: Table): string[] {
  const cuts = new Map<string, Set<string>>();
  for (const { cut, reasons } of table.refused) {
    const text = reasons.map((reason) => reason.text).join(" ");
    const names = cuts.get(text) ?? new Set<string>();
    cuts.set(text, names.add(cutName(cut, spec)));
  }
  const lines = [...cuts].map(([text, names]) => {
    const [first, ...others] = names;
    return `  ${first}${others.length === 0 ? "" : ` and ${others.length} more`}: ${text}`;
  });
  return lines.length === 0 ? [] : ["", "not looked at", ...lines];
}

function ledgerLines(best: Candidate | undefined): string[] {
  const ledger = best === undefined ? undefined : fullestRank(best);
  if (ledger === undefined) return [];
  const rows = ledger.lines.map((line) => [`  ${className(line.class)}`, gigabytes(Number(line.bytes))]);
  rows.push(["  used", gigabytes(Number(ledger.used))], ["  of", gigabytes(Number(ledger.capacity))]);
  return [`bytes of rank ${ledger.rank}, the fullest`, ...aligned(rows)];
}

const reasonLine = ({ kind, code, text }: Reason): string => `  ${reasonName(kind).padEnd(10)}${code}: ${text}`;

// ---- data ----

/** For `--json`: everything of the text and the plan itself, the tensor table left out. */
export function planJson({ spec, inventory, wishes }: Asked, planned: Planned): unknown {
  const { name, family, source, format, projected, planOnly } = spec;
  const parameters = { total: Number(spec.parameters), active: Number(spec.parametersActive) };
  const reasons = planned.kind === "feasible" ? planned.plan.reasons : planned.reasons;
  const named = reasons.map(({ kind, code, text }) => ({ kind: reasonName(kind), code, text }));
  return {
    kind: planned.kind,
    model: { name, family, source, format, projected, planOnly, parameters },
    inventory: inventoryName(inventory),
    wishes,
    plan: planned.kind === "feasible" ? ShardPlan.toJSON({ ...planned.plan, model: undefined }) : null,
    reasons: named,
    remedy: planned.kind === "infeasible" && planned.remedy !== undefined ? remedyJson(planned.remedy) : null,
    candidates: planned.table.candidates.map((candidate) => candidateJson(spec, candidate)),
    refused: planned.table.refused.map(({ cut, reasons: causes }) => ({
      cut,
      reasons: causes.map(({ code, text }) => ({ code, text })),
    })),
  };
}

function remedyJson(remedy: NonNullable<Extract<Planned, { kind: "infeasible" }>["remedy"]>): unknown {
  return { kind: remedy.kind, text: remedy.text, inventory: inventoryName(remedy.inventory), wishes: remedy.wishes };
}

function candidateJson(spec: ModelSpec, candidate: Candidate): unknown {
  const { cut, workers, fits, misfit, contextTokens, kvBlocks, prediction } = candidate;
  return {
    name: cutName(cut, spec),
    cut,
    workers,
    fits,
    misfit: misfit ?? null,
    contextTokens,
    kvBlocks,
    prediction: fits ? prediction : null,
    ranks: candidate.ledgers.map((ledger) => ({
      rank: ledger.rank,
      used: Number(ledger.used),
      capacity: Number(ledger.capacity),
      bytes: Object.fromEntries(ledger.lines.map((line) => [className(line.class), Number(line.bytes)])),
    })),
  };
}
