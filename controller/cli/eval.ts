// `muster eval`: runs given tokens through a model in this process, cache and chunking as in serving, and prints what the
// model says of them: logits (for comparing implementations) or perplexity (for comparing formats).
import { readFileSync } from "node:fs";
import { Command, InvalidArgumentError } from "commander";
import type { ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { EngineOptions, type Row, type SlotUpdate } from "../../proto/gen/muster/v1/worker.ts";
import { greedy } from "../../proto/sampling.ts";
import type { Engine } from "../../worker/engine/engine.ts";
import { openEngine } from "../../worker/engine/native.ts";
import { Tokenizer } from "../../worker/token/tokenizer.ts";
import { readModel } from "../model/model.ts";
import { slicesOf } from "../model/shards.ts";
import { planShards } from "../plan/plan.ts";
import { wishesOf } from "../plan/wishes.ts";
import { parseCount, thisMachine } from "./plan.ts";

type Options = { ranks?: number; ep?: number; etp?: number; backend: string; isa?: string; json?: boolean };

const CHUNK_TOKENS = 128;
const TEXT_BYTES_MAX = 64 * 1024 * 1024;

export function evalCommand(): Command {
  const command = new Command("eval").description("Logits and perplexity of given tokens, computed in this process.");
  withEngineOptions(command.command("logits"))
    .description("Prints one row of float32 logits for each position.")
    .argument("<source>")
    .requiredOption("--tokens <ids>", "token ids, separated by commas", parseIds)
    .action(async (source: string, options: Options & { tokens: number[] }) => {
      const logits: number[][] = [];
      await withModel(source, options, async (engine, plan) => {
        for await (const rows of score(engine, plan, options.tokens)) logits.push(...rows.map((row) => [...row]));
      });
      if (options.json) console.log(JSON.stringify({ tokens: options.tokens, logits }));
      else
        for (const [i, row] of logits.entries())
          console.log(`${options.tokens[i]}\t${row.map((x) => x.toFixed(5)).join(" ")}`);
    });
  withEngineOptions(command.command("perplexity"))
    .description("Prints the perplexity of a text, in windows of the model's context.")
    .argument("<source>")
    .requiredOption("--text <file>", "UTF-8 text")
    .option("--window <tokens>", "tokens of a window; default: the context, at most 2048", parseCount)
    .action(async (source: string, options: Options & { text: string; window?: number }) =>
      perplexity(source, options),
    );
  return command;
}

function withEngineOptions(command: Command): Command {
  return command
    .option("--ranks <count>", "ranks, all in this process", parseCount)
    .option("--ep <count>", "slots that whole experts are dealt to", parseCount)
    .option("--etp <count>", "ranks that one expert is cut over", parseCount)
    .option("--backend <name>", "cpu, or ref: plain loops, the specification", "cpu")
    .option("--isa <name>", "avx512, avx2 or scalar; default: the best this CPU has")
    .option("--json", "JSON on standard output");
}

function parseIds(text: string): number[] {
  const ids = text.split(",").map(Number);
  if (ids.length === 0 || ids.some((id) => !Number.isInteger(id) || id < 0)) {
    throw new InvalidArgumentError("token ids, such as 1,2,3, are needed.");
  }
  return ids;
}

async function withModel(
  source: string,
  options: Options,
  use: (engine: Engine, plan: ShardPlan) => Promise<void>,
): Promise<void> {
  const spec = await readModel(source);
  const pins = { ranks: options.ranks ?? 1, workers: 1, ep: options.ep, etp: options.etp };
  const planned = planShards(spec, thisMachine(1), wishesOf({ concurrency: 1, pins }));
  if (planned.kind === "infeasible") {
    const remedy = planned.remedy ? `; what fits: ${planned.remedy.text}` : "";
    throw new Error(`${planned.reasons.map((reason) => reason.text).join(" ")}${remedy}`);
  }
  const { plan } = planned;
  const wish = { backend: options.backend, isa: options.isa ?? "", rowsMax: 1, tokensMax: CHUNK_TOKENS, slotsMax: 4 };
  const engineOptions = EngineOptions.create({
    ...wish,
    verifyMax: 1,
    logprobsMax: 21,
    stallReportMs: 5_000,
    stallGiveUpMs: 10_000,
  });
  const engine = await openEngine({ plan, worker: 0, slices: slicesOf(plan, 0), options: engineOptions });
  try {
    await use(engine, plan);
  } finally {
    await engine.close();
  }
}

/** Logits of every position, in order; one array of rows for each chunk. */
async function* score(engine: Engine, plan: ShardPlan, tokens: readonly number[]): AsyncGenerator<Float32Array[]> {
  const vocab = plan.model?.vocabSize ?? 0;
  const held = Math.min(plan.contextTokens, (plan.kvBlocks - 1) * plan.kvBlockTokens);
  if (tokens.length > held) throw new Error(`${tokens.length} tokens are more than the ${held} that the plan holds`);
  const blocks = Array.from({ length: Math.ceil(tokens.length / plan.kvBlockTokens) }, (_, i) => i + 1);
  const opening = {
    ids: [...tokens],
    generatedFrom: tokens.length,
    seedLow: 0n,
    seedHigh: 0n,
    sampling: greedy,
    computed: 0,
    blocks,
  };
  const open: SlotUpdate = { slot: 1, kind: { $case: "open", value: opening } };
  for (let first = 0; first < tokens.length; first += CHUNK_TOKENS) {
    const count = Math.min(CHUNK_TOKENS, tokens.length - first);
    const row: Row = { slot: 1, count, drafts: [], sample: false, logprobs: 0, logits: true, margins: false };
    const result = await engine.launch({
      step: nextStep(engine),
      updates: first === 0 ? [open] : [],
      rows: [row],
      incarnation: 0n,
    });
    const logits = result.rows[0]?.logits ?? new Float32Array();
    yield Array.from({ length: count }, (_, i) => logits.subarray(i * vocab, (i + 1) * vocab));
  }
  const close: SlotUpdate = { slot: 1, kind: { $case: "close", value: {} } };
  await engine.launch({ step: nextStep(engine), updates: [close], rows: [], incarnation: 0n });
}

const steps = new WeakMap<Engine, bigint>();

function nextStep(engine: Engine): bigint {
  const step = (steps.get(engine) ?? 0n) + 1n;
  steps.set(engine, step);
  return step;
}

async function perplexity(source: string, options: Options & { text: string; window?: number }): Promise<void> {
  const bytes = readFileSync(options.text);
  if (bytes.length > TEXT_BYTES_MAX) throw new Error(`${options.text}: more than ${TEXT_BYTES_MAX} bytes`);
  await withModel(source, options, async (engine, plan) => {
    const tokenizerSpec = plan.model?.tokenizer;
    if (!tokenizerSpec) throw new Error("the model has no tokenizer");
    const tokenizer = await Tokenizer.load(tokenizerSpec);
    const ids = await tokenizer.encode(bytes.toString("utf8"));
    const window = Math.min(options.window ?? 2048, plan.contextTokens);
    let negative = 0;
    let counted = 0;
    for (let first = 0; first + 1 < ids.length; first += window) {
      const tokens = ids.slice(first, first + window);
      let position = 0;
      for await (const rows of score(engine, plan, tokens)) {
        for (const row of rows) {
          const next = tokens[++position];
          if (next === undefined) continue;
          negative += logSumExp(row) - (row[next] ?? 0);
          counted++;
        }
      }
      if (process.stderr.isTTY)
        process.stderr.write(
          `\r${counted} of ${ids.length} tokens, perplexity ${Math.exp(negative / counted).toFixed(3)}`,
        );
    }
    if (process.stderr.isTTY) process.stderr.write("\n");
    if (counted === 0) throw new Error(`${options.text}: fewer than two tokens`);
    const nll = negative / counted;
    if (options.json) console.log(JSON.stringify({ tokens: counted, nll, perplexity: Math.exp(nll) }));
    else console.log(`perplexity ${Math.exp(nll).toFixed(4)} (nll ${nll.toFixed(5)} over ${counted} tokens)`);
  });
}

function logSumExp(row: Float32Array): number {
  let max = Number.NEGATIVE_INFINITY;
  for (const x of row) if (x > max) max = x;
  let sum = 0;
  for (const x of row) sum += Math.exp(x - max);
  return max + Math.log(sum);
}
