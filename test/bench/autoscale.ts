// Question: what does the autoscaler save, and cost, on traffic as it was recorded elsewhere?
// Method: the requests of a trace meet simulated replicas in virtual time (test/controller/reconcile/traffic.ts); the autoscaler
//   sets their number. The same trace is played with every fixed number of replicas: the cheapest that serves as large a share
//   within the target is what it is compared with. `rate` thickens the trace: that many copies of each request, spread over a
//   minute by seed.
// Traces: CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces), JSON lines with timestamp (ms),
//   input_length, output_length (Mooncake), or, without a path, the committed synthetic day.
// Not measured: anything real. Replicas are a model (concurrency, prompt rate, time between tokens, start); no GPU, no network,
//   no prefix cache.
// Prints a table; appends one row for each trace to test/bench/results/autoscale.csv.
//
//   npm run bench -- autoscale [path of a trace] [rate]
import { execFileSync } from "node:child_process";
import { appendFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import {
  type Outcome,
  play,
  type Run,
  requestsOf,
  seeded,
  type TracedRequest,
} from "../controller/reconcile/traffic.ts";

const DAY = join(import.meta.dirname, "../controller/reconcile/traffic.csv");
const RESULTS = join(import.meta.dirname, "results/autoscale.csv");
const MAX = 48;
const RATE_MAX = 100;
const MINUTE = 60_000;

const RUN: Run = {
  policy: {
    min: 1,
    max: MAX,
    targets: { queue: 4, ttftMs: 10_000 },
    concurrency: 16,
    tokensPerSecond: undefined,
    startMs: MINUTE,
  },
  replica: { concurrency: 16, startMs: MINUTE, prefillTokensPerSecond: 20_000, itlMs: 30, itlMsPerSequence: 2 },
  start: 1,
};

function stop(text: string): never {
  console.error(`bench autoscale: ${text}`);
  process.exit(2);
}

/** Arrivals from 0, ascending. */
function read(path: string): TracedRequest[] {
  const lines = readFileSync(path, "utf8").trim().split(/\r?\n/);
  if (lines[0] === "minute,requests")
    return requestsOf(
      lines.slice(1).map((line) => Number(line.split(",")[1])),
      5,
    );
  const requests = lines[0]?.startsWith("{") ? lines.map(fromJson) : lines.slice(1).map(fromCsv);
  const bad = requests.findIndex(({ atMs, context, generated }) => !Number.isFinite(atMs + context + generated));
  if (bad >= 0 || requests.length === 0)
    stop(`${path}: request ${bad + 1} has no time or sizes; neither of the known formats`);
  const first = requests.reduce((least, { atMs }) => Math.min(least, atMs), Number.POSITIVE_INFINITY);
  return requests.map((each) => ({ ...each, atMs: each.atMs - first })).toSorted((one, other) => one.atMs - other.atMs);
}

function fromCsv(line: string): TracedRequest {
  const [time = "", context, generated] = line.split(",");
  const atMs = Date.parse(`${time.trim().replace(" ", "T").slice(0, 23)}Z`);
  return { atMs, context: Number(context), generated: Number(generated) };
}

function fromJson(line: string): TracedRequest {
  const value: Record<string, unknown> = JSON.parse(line);
  return { atMs: Number(value.timestamp), context: Number(value.input_length), generated: Number(value.output_length) };
}

function thicken(trace: readonly TracedRequest[], rate: number): TracedRequest[] {
  const random = seeded(7);
  return trace
    .flatMap((each) =>
      Array.from({ length: rate }, (_, copy) => ({
        ...each,
        atMs: each.atMs + (copy === 0 ? 0 : Math.floor(random() * MINUTE)),
      })),
    )
    .toSorted((one, other) => one.atMs - other.atMs);
}

const hours = (outcome: Outcome): number => outcome.replicaSeconds / 3600;
const percent = (share: number): string => `${(share * 100).toFixed(2)} %`;

const path = process.argv[2] ?? DAY;
const rate = Number(process.argv[3] ?? 1);
if (!existsSync(path)) stop(`there is no file ${path}`);
if (!Number.isInteger(rate) || rate < 1 || rate > RATE_MAX)
  stop(`rate is ${process.argv[3]}; 1 to ${RATE_MAX} are possible`);

const trace = thicken(read(path), rate);
const scaled = play(trace, RUN);
console.log(
  `${basename(path)} x ${rate}: ${trace.length} requests in ${((trace.at(-1)?.atMs ?? 0) / 3.6e6).toFixed(2)} hours`,
);
const row = (name: string, outcome: Outcome): void =>
  console.log(
    `${name.padEnd(12)} ${percent(outcome.withinTtft).padStart(9)} in time  ${hours(outcome).toFixed(1).padStart(8)} replica hours`,
  );
row("autoscaled", scaled);
let equal: Outcome | undefined;
for (let fixed = 1; fixed <= MAX && equal === undefined; fixed++) {
  const outcome = play(trace, { ...RUN, fixed });
  row(`fixed ${fixed}`, outcome);
  if (outcome.withinTtft >= scaled.withinTtft) equal = outcome;
}
const turns = scaled.changes.length;
const saved = equal === undefined ? Number.NaN : 1 - hours(scaled) / hours(equal);
console.log(
  `${turns} changes, at most ${scaled.peak} replicas, worst wait ${(scaled.ttftWorstMs / 1000).toFixed(0)} s`,
);
console.log(
  equal ? `saves ${percent(saved)} against ${equal.peak} fixed` : `no fixed number up to ${MAX} serves as much in time`,
);

const HEADER = "commit,trace,rate,requests,within_ttft,replica_hours,peak,changes,worst_wait_s,fixed_equal,saved\n";
mkdirSync(dirname(RESULTS), { recursive: true });
if (!existsSync(RESULTS)) writeFileSync(RESULTS, HEADER);
const commit = execFileSync("git", ["rev-parse", "--short", "HEAD"], {
  cwd: import.meta.dirname,
  encoding: "utf8",
}).trim();
const figures = [trace.length, scaled.withinTtft.toFixed(4), hours(scaled).toFixed(2), scaled.peak, turns];
const rest = [(scaled.ttftWorstMs / 1000).toFixed(1), equal?.peak ?? "", Number.isNaN(saved) ? "" : saved.toFixed(3)];
appendFileSync(RESULTS, `${[commit, basename(path), rate, ...figures, ...rest].join(",")}\n`);
