// `muster up`: one command from a source to a served model on this machine. Reads headers, plans, shows why, starts
// everything, says how to talk to it, and stops all of it on Ctrl-C.
import { Command } from "commander";
import { FaultError } from "../../proto/fault.ts";
import { type ModelSpec, type Reason, Reason_Kind, type ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import { EngineOptions, Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";
import { LocalRun, type LocalWish } from "../local/local-run.ts";
import { readModel } from "../model/model.ts";
import { planShards } from "../plan/plan.ts";
import { wishesOf } from "../plan/wishes.ts";
import { parseCount, parseTokens, thisMachine } from "./plan.ts";
import { Teller } from "./up-teller.ts";

type Options = {
  nodes: number;
  ranks?: number;
  tp?: number;
  ep?: number;
  etp?: number;
  context?: number;
  concurrency: number;
  kvBytes?: number;
  draft?: string;
  draftTokens: number;
  draftWaitMs: number;
  http: string;
  grpc: string;
  apiKey?: string;
  alias: string[];
  threads?: number;
  backend: string;
  isa?: string;
  json?: boolean;
};

const EXIT = { failed: 1, invalid: 2, infeasible: 3 };
/** Draft tokens that a step may verify for each sequence; the engine's buffers are sized from it. */
const VERIFY_MAX = 8;
const WAIT_MS_MAX = 10_000;

/** A call that cannot be carried out: what to say and how to exit. */
class Refusal extends Error {
  readonly exit: number;
  constructor(message: string, exit: number) {
    super(message);
    this.exit = exit;
  }
}

export function upCommand(): Command {
  return new Command("up")
    .description("Serves a model on this machine until Ctrl-C: plan, workers, draft, gateway.")
    .argument("<source>", "builtin://nano-maverick, file:///path, hf://org/name[@rev][/file.gguf] or https://...")
    .option("--nodes <count>", "worker processes to spread the ranks over", parseCount, 1)
    .option("--ranks <count>", "ranks of the group; default: the planner's choice", parseCount)
    .option("--tp <count>", "ranks that attention is cut over", parseCount)
    .option("--ep <count>", "slots that whole experts are dealt to", parseCount)
    .option("--etp <count>", "ranks that one expert is cut over", parseCount)
    .option("--context <tokens>", "tokens one sequence may have, such as 8k", parseTokens)
    .option("--concurrency <count>", "sequences that run at once", parseCount, 64)
    .option("--kv-bytes <bytes>", "KV memory of each rank, such as 64M", parseTokens)
    .option("--draft <source>", "a small model of the same vocabulary that guesses ahead")
    .option("--draft-tokens <count>", `tokens guessed for each step, at most ${VERIFY_MAX}`, parseCount, 4)
    .option("--draft-wait-ms <ms>", "longest wait of a step for missing guesses", parseCount, 20)
    .option("--http <host:port>", "where to take HTTP; port 0 picks a free one", "127.0.0.1:8080")
    .option("--grpc <host:port>", "where to take gRPC; port 0 picks a free one", "127.0.0.1:8081")
    .option("--api-key <key>", "ask clients for this key; needed beyond loopback (or MUSTER_API_KEY)")
    .option(
      "--alias <name>",
      "another name for the model; may be given again",
      (name, all: string[]) => [...all, name],
      [],
    )
    .option("--threads <count>", "threads of each worker; default: the cores are shared out", parseCount)
    .option("--backend <name>", "cpu, or ref: plain loops, the specification", "cpu")
    .option("--isa <name>", "avx512, avx2 or scalar; default: the best this CPU has")
    .option("--json", "one JSON line on standard output when ready")
    .addHelpText("after", "\nExit codes: 0 stopped, 1 failed, 2 call or source is invalid, 3 no cut fits.")
    .action(async (source: string, options: Options) => {
      process.exitCode = await runUp(source, options).catch((error: unknown) => {
        const said = error instanceof Error ? error.message : String(error);
        process.stderr.write(`muster up: ${said}\n`);
        if (error instanceof Refusal) return error.exit;
        return error instanceof FaultError && error.fault.kind === Fault_Kind.INVALID ? EXIT.invalid : EXIT.failed;
      });
    });
}

async function runUp(source: string, options: Options): Promise<number> {
  const stop = new AbortController();
  const onSignal = () => stop.abort();
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, onSignal);
  checkOptions(options);
  const teller = new Teller(options.json ?? false);
  const [model, draft] = await Promise.all([
    read(source, teller),
    options.draft ? read(options.draft, teller) : undefined,
  ]);
  const wish = wishOf(model, draft, options);
  teller.plan(wish.plan, "target");
  if (wish.draft) teller.plan(wish.draft.plan, "draft");
  let failure: string | undefined;
  const run = await LocalRun.start(wish, {
    onModel: (status) => teller.status(wish.name, status),
    onDraft: (status) => teller.status("draft", status),
    onEnd: (why, isFailure) => {
      if (isFailure) failure = why;
      stop.abort();
    },
  });
  try {
    const addresses = await run.gateway();
    const isReady = await teller.ready(wish.draft !== undefined, stop.signal);
    if (isReady) {
      const facts = { ...addresses, logs: run.folder.logs, run: run.folder.path };
      teller.howToTalk(wish.name, facts, wish.apiKey !== undefined);
      await new Promise<void>((done) => {
        if (stop.signal.aborted) done();
        stop.signal.addEventListener("abort", () => done(), { once: true });
      });
    }
    teller.say("stopping");
  } finally {
    await run.stop();
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.off(signal, onSignal);
  }
  if (failure) throw new Error(failure);
  return 0;
}

async function read(source: string, teller: Teller): Promise<ModelSpec> {
  const spec = await readModel(source, { onProgress: (progress) => teller.download(progress) });
  if (spec.planOnly) throw new Refusal(`${spec.name} cannot be served: ${spec.planOnly}`, EXIT.infeasible);
  return spec;
}

function checkOptions(options: Options): void {
  const refuse = (text: string) => {
    throw new Refusal(text, EXIT.invalid);
  };
  if (options.draftTokens > VERIFY_MAX) refuse(`--draft-tokens ${options.draftTokens}: at most ${VERIFY_MAX}`);
  if (options.draftWaitMs > WAIT_MS_MAX) refuse(`--draft-wait-ms ${options.draftWaitMs}: at most ${WAIT_MS_MAX}`);
  if (!["cpu", "ref"].includes(options.backend)) refuse(`--backend ${options.backend}: cpu or ref`);
  const hasKey = Boolean(options.apiKey ?? process.env.MUSTER_API_KEY);
  for (const name of ["http", "grpc"] as const) {
    const match = /^(?:\[([0-9a-fA-F:]+)\]|([^:]+)):(\d{1,5})$/.exec(options[name]);
    const host = match?.[1] ?? match?.[2] ?? "";
    if (!match || Number(match[3]) > 65_535) refuse(`--${name} ${options[name]}: HOST:PORT is needed`);
    const isLoopback = host === "localhost" || host === "::1" || /^127\./.test(host);
    if (!isLoopback && !hasKey)
      refuse(`--${name} ${options[name]} is open to others: give --api-key or MUSTER_API_KEY`);
  }
}

function wishOf(model: ModelSpec, draft: ModelSpec | undefined, options: Options): LocalWish {
  const { nodes, ranks, tp, ep, etp, concurrency, context, kvBytes } = options;
  const inventory = thisMachine(nodes);
  const pins = { ranks, workers: nodes, tp, ep, etp };
  const planned = planShards(model, inventory, wishesOf({ contextTokens: context, kvBytes, concurrency, pins }));
  if (planned.kind === "infeasible") {
    const remedy = planned.remedy ? [`what fits: ${planned.remedy.text}`] : [];
    throw new Refusal(
      [`${model.name} cannot be cut as wished:`, ...planned.reasons.map(textOf), ...remedy].join("\n  "),
      EXIT.infeasible,
    );
  }
  const machine = thisMachine(1).nodes[0];
  const cores = machine?.kind === "cpu" ? machine.cores : 1;
  const threads = options.threads ?? Math.max(1, Math.floor(cores / nodes));
  const engine = EngineOptions.create({
    threads,
    backend: options.backend,
    isa: options.isa ?? "",
    rowsMax: Math.max(concurrency, 64),
    verifyMax: VERIFY_MAX,
    slotsMax: concurrency * 2 + 2,
  });
  return {
    name: model.name,
    aliases: options.alias,
    plan: planned.plan,
    inventory,
    engine,
    limits: { queueMax: 256, runningMax: concurrency },
    draft: draft && {
      plan: draftPlan(model, draft, concurrency),
      tokens: options.draftTokens,
      waitMs: options.draftWaitMs,
      engine: { ...engine, threads: 1 },
    },
    http: options.http,
    grpc: options.grpc,
    apiKey: options.apiKey ?? process.env.MUSTER_API_KEY,
  };
}

function draftPlan(model: ModelSpec, draft: ModelSpec, concurrency: number): ShardPlan {
  if (draft.tokenizer?.vocabHash !== model.tokenizer?.vocabHash) {
    throw new Refusal(`${draft.name} cannot draft for ${model.name}: their vocabularies differ`, EXIT.invalid);
  }
  const planned = planShards(draft, thisMachine(1), wishesOf({ concurrency, pins: { ranks: 1, workers: 1 } }));
  if (planned.kind === "feasible") return planned.plan;
  throw new Refusal([`${draft.name} does not fit:`, ...planned.reasons.map(textOf)].join("\n  "), EXIT.infeasible);
}

const textOf = (reason: Reason): string =>
  reason.kind === Reason_Kind.REMEDY ? `what fits: ${reason.text}` : reason.text;
