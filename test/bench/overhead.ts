// Question: how much of the engines' speed is left when tokens go the whole way to a client?
// Method: nano-maverick (BF16 as stored) in the cut of `npm start`: two workers of one rank and one thread, experts split, joined
//   over tcp loopback; no draft. Both ways decode 16 prompts x 256 tokens, greedy, end of text ignored:
//   (a) `muster up`, real processes, 16 SSE streams of /v1/completions on raw sockets from a client process of its own;
//   (b) the engines of both workers in this process, in lock-step with the plans of a leader, nothing else.
//   Rounds of (a) and (b) alternate, so that a drift of the machine meets both; WARM_ROUNDS come first, so that code is compiled;
//   medians are compared. CPU time is utime + stime of /proc/PID/stat over the rounds of (a), so waiting that spins counts as CPU.
// Checked in the same run: the token ids of (a), asked for in its first round, which is not timed, are those of (b); the text of
//   every timed round is the text of that one.
// Machine: printed, and a column of each row. The load average before the start is another: rows of a busy machine say so.
// Not measured: the kernels against the roofline (6 M parameters stay in the caches), time to first token, a network, TLS,
//   other batch sizes, speculation.
// Appends one row to test/bench/results/overhead.csv. Exit 1: ids differ, or the share is below SHARE_MIN.
//
//   npm run bench -- overhead [rounds]
import { type ChildProcess, fork } from "node:child_process";
import { readFileSync } from "node:fs";
import os from "node:os";
import { join } from "node:path";
import { thisMachine } from "../../controller/cli/plan.ts";
import { readModel } from "../../controller/model/model.ts";
import { planShards } from "../../controller/plan/plan.ts";
import { wishesOf } from "../../controller/plan/wishes.ts";
import { EngineOptions } from "../../proto/gen/muster/v1/worker.ts";
import { engineOptionsOf } from "../../worker/serve/options.ts";
import { Muster } from "../cluster/muster.ts";
import { BareGroup } from "./in-process.ts";
import type { Order, Reply, Said } from "./overhead-client.ts";
import { appendRow, commit, median } from "./row.ts";

const MODEL = "nano-maverick";
const STREAMS = 16;
const TOKENS = 256;
const SHARE_MIN = 0.5;
const ROUNDS = 15;
/** Before the clock starts: until its code is compiled (a) is a third slower; the first of these rounds is printed as cold. */
const WARM_ROUNDS = 5;
const ROUNDS_MAX = 1000;
const WORKERS = 2;
const CONCURRENCY = 64;
/** Linux counts process times in hundredths of a second (USER_HZ), whatever the kernel's own tick. */
const TICK_MS = 10;
const ROLES = ["gateway", "leader", "follower", "client"] as const;
const RESULTS = join(import.meta.dirname, "results/overhead.csv");

type Role = (typeof ROLES)[number];
type Cpu = Record<Role, number>;
type Result = { cold: number; served: number[]; bare: number[]; cpuUs: Cpu; isSame: boolean };

const prompts: string[] = JSON.parse(
  readFileSync(join(import.meta.dirname, "../fixtures/prompts.json"), "utf8"),
).prompts.slice(0, STREAMS);

const bodyOf = (prompt: string, withIds: boolean): string =>
  JSON.stringify({
    model: MODEL,
    prompt,
    max_tokens: TOKENS,
    temperature: 0,
    ignore_eos: true,
    stream: true,
    stream_options: { include_usage: true },
    muster: { speculation: false, return_token_ids: withIds },
  });

class Client {
  readonly process: ChildProcess;
  constructor() {
    this.process = fork(join(import.meta.dirname, "overhead-client.ts"));
  }

  async ask(port: number, withIds: boolean): Promise<number> {
    const reply = await this.#order({
      kind: "ask",
      port,
      bodies: prompts.map((prompt) => bodyOf(prompt, withIds)),
    });
    if (reply.kind !== "done") throw new Error(`the client answered ${reply.kind}`);
    return reply.ms;
  }

  async read(): Promise<Said[]> {
    const reply = await this.#order({ kind: "read" });
    if (reply.kind !== "read") throw new Error(`the client answered ${reply.kind}`);
    const odd = reply.said.find(({ tokens }) => tokens !== TOKENS);
    if (odd || reply.said.length !== STREAMS) throw new Error(`a stream has ${odd?.tokens} tokens, not ${TOKENS}`);
    return reply.said;
  }

  close(): void {
    this.process.kill();
  }

  #order(order: Order): Promise<Reply> {
    const { process } = this;
    return new Promise((resolve, reject) => {
      const onClose = (code: number | null) => reject(new Error(`the client ended with ${code}`));
      process.once("close", onClose);
      process.once("message", (reply: Reply) => {
        process.off("close", onClose);
        if (reply.kind === "failed") reject(new Error(`the client failed: ${reply.detail}`));
        else resolve(reply);
      });
      process.send(order);
    });
  }
}

/** Milliseconds of CPU that a process has had; the name in field 2 may hold spaces, so fields are counted from its end. */
function cpuMs(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[11]) + Number(fields[12])) * TICK_MS;
}

function pidsOf(up: Muster, client: Client): Cpu {
  const gateway = up.processes().find(({ command }) => / gateway --control /.test(command))?.pid;
  const [leader, follower] = [up.worker(0), up.worker(1)];
  const { pid } = client.process;
  if (!gateway || !leader || !follower || !pid) throw new Error("a process of the run was not found");
  return { gateway, leader, follower, client: pid };
}

const forRoles = (value: (role: Role) => number): Cpu => ({
  gateway: value("gateway"),
  leader: value("leader"),
  follower: value("follower"),
  client: value("client"),
});

/** The cut and the engine options that `muster up --nodes 2 --ranks 2 --ep 2` comes to (controller/cli/up.ts). */
async function openBare(): Promise<BareGroup> {
  const model = await readModel(`builtin://${MODEL}`);
  const pins = { ranks: WORKERS, workers: WORKERS, ep: WORKERS };
  const planned = planShards(model, thisMachine(WORKERS), wishesOf({ concurrency: CONCURRENCY, pins }));
  if (planned.kind === "infeasible") throw new Error(planned.reasons.map(({ text }) => text).join("; "));
  const wish = { threads: 1, backend: "cpu", rowsMax: CONCURRENCY, verifyMax: 8, slotsMax: CONCURRENCY * 2 + 2 };
  return BareGroup.open(planned.plan, engineOptionsOf(EngineOptions.create(wish)));
}

/** What the served ranks' bits depend on, as the gateway tells it. */
async function numericsIdOf(up: Muster): Promise<string> {
  const answer = await fetch(`${up.ready.http}/v1/models/${MODEL}`);
  const model: { muster?: { numerics_id?: string } } = JSON.parse(await answer.text());
  return model.muster?.numerics_id ?? "";
}

async function measure(up: Muster, client: Client, bare: BareGroup, rounds: number): Promise<Result> {
  const port = Number(new URL(up.ready.http).port);
  const numericsId = await numericsIdOf(up);
  if (numericsId !== bare.numericsId) throw new Error(`not the same ranks: ${numericsId} and ${bare.numericsId}`);
  await client.ask(port, true);
  const first = await client.read();
  const promptIds = first.map((said) => said.promptIds);
  const pids = pidsOf(up, client);
  const cpu = forRoles(() => 0);
  const result: Result = { cold: 0, served: [], bare: [], cpuUs: cpu, isSame: true };
  for (let round = -WARM_ROUNDS; round < rounds; round++) {
    const before = forRoles((role) => cpuMs(pids[role]));
    const speed = speedOf(await client.ask(port, false));
    const spent = forRoles((role) => cpuMs(pids[role]) - before[role]);
    const said = await client.read();
    const inProcess = await bare.run(promptIds, TOKENS);
    result.isSame &&= said.every(({ text }, index) => text === first[index]?.text);
    result.isSame &&= inProcess.ids.every((ids, index) => ids.join() === first[index]?.ids.join());
    if (round === -WARM_ROUNDS) result.cold = speed;
    if (round < 0) continue;
    result.served.push(speed);
    result.bare.push(speedOf(inProcess.ms));
    for (const role of ROLES) cpu[role] += (spent[role] * 1000) / (STREAMS * TOKENS * rounds);
  }
  return result;
}

/** Tokens/s of a round. */
const speedOf = (ms: number): number => (STREAMS * TOKENS * 1000) / ms;

function spread(values: readonly number[]): string {
  return `${median(values).toFixed(0).padStart(7)} tokens/s   (${Math.min(...values).toFixed(0)} to ${Math.max(...values).toFixed(0)})`;
}

const HEADER =
  "date,commit,cpu,cores,load_before,rounds,gateway_tokens_per_s,in_process_tokens_per_s,share,gateway_cpu_us_per_token,leader_cpu_us_per_token,follower_cpu_us_per_token,client_cpu_us_per_token";

async function main(): Promise<number> {
  const rounds = Number(process.argv[2] ?? ROUNDS);
  if (!Number.isInteger(rounds) || rounds < 1 || rounds > ROUNDS_MAX) {
    console.error(`overhead: ${process.argv[2]} rounds: a whole number from 1 to ${ROUNDS_MAX} is needed`);
    return 2;
  }
  const load = (os.loadavg()[0] ?? 0).toFixed(2);
  const up = await Muster.up([
    `builtin://${MODEL}`,
    "--nodes",
    `${WORKERS}`,
    "--ranks",
    `${WORKERS}`,
    "--ep",
    `${WORKERS}`,
  ]);
  const client = new Client();
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.once(signal, () => {
      client.close();
      up.stop().finally(() => process.exit(1));
    });
  }
  let result: Result;
  try {
    const bare = await openBare();
    result = await measure(up, client, bare, rounds).finally(() => bare.close());
  } finally {
    client.close();
    await up.stop();
  }
  const { cold, served, bare, cpuUs, isSame } = result;
  const share = median(served) / median(bare);
  const cpu = os.cpus()[0]?.model.trim() ?? "unknown";
  const cores = os.availableParallelism();
  console.log(
    `${MODEL}, ${WORKERS} workers of one rank and one thread over tcp, ${STREAMS} streams x ${TOKENS} tokens, ${rounds} rounds`,
  );
  console.log(`CPU                      ${cpu}, ${cores} cores, load ${load} before the start`);
  console.log(`(a) through the gateway  ${spread(served)}`);
  console.log(`    its first round, cold${cold.toFixed(0).padStart(8)} tokens/s`);
  console.log(`(b) engines in-process   ${spread(bare)}`);
  console.log(
    `share a / b              ${(share * 100).toFixed(1).padStart(7)} %          at least ${SHARE_MIN * 100} % is asked`,
  );
  for (const role of ROLES) console.log(`CPU of ${role.padEnd(17)} ${cpuUs[role].toFixed(1).padStart(7)} us/token`);
  console.log(`token ids of a and b     ${isSame ? "equal" : "DIFFER"}`);
  const figures = [median(served).toFixed(0), median(bare).toFixed(0), share.toFixed(3)];
  const times = ROLES.map((role) => cpuUs[role].toFixed(1));
  if (isSame)
    appendRow(RESULTS, HEADER, [new Date().toISOString(), commit(), cpu, cores, load, rounds, ...figures, ...times]);
  return isSame && share >= SHARE_MIN ? 0 : 1;
}

process.exitCode = await main();
