// What the controller hears of demand: the gateway's stream against a real Reports service that writes down what comes.
import { Server, ServerCredentials, type ServerDuplexStream, status } from "@grpc/grpc-js";
import { afterEach, expect, test } from "vitest";
import { DemandCount } from "../../../controller/gateway/demand-count.ts";
import { Phase } from "../../../proto/gen/muster/v1/control.ts";
import {
  type DemandReport,
  type ModelDemand,
  type ReportsServer,
  ReportsService,
  type ReportTaken,
} from "../../../proto/gen/muster/v1/report.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { noTrust, type Peer } from "../../../proto/trust.ts";
import { type Bed, MODEL, makeBed, servedModel, until } from "./bed.ts";
import { ask, openSse } from "./sse-client.ts";

type Call = ServerDuplexStream<DemandReport, ReportTaken>;

class ScriptedReports {
  target = "";
  /** By stream. */
  readonly streams: { call: Call; reports: { atMs: number; report: DemandReport }[] }[] = [];
  #server = new Server(channelOptions);

  async start(port = 0): Promise<void> {
    this.#server = new Server(channelOptions);
    const unimplemented = (call: { emit(event: string, error: object): void }) =>
      call.emit("error", { code: status.UNIMPLEMENTED });
    const service: ReportsServer = {
      group: unimplemented,
      inspected: unimplemented,
      demand: (call: Call) => {
        const stream = { call, reports: [] as { atMs: number; report: DemandReport }[] };
        this.streams.push(stream);
        call.on("data", (report: DemandReport) => {
          stream.reports.push({ atMs: performance.now(), report });
          call.write({});
        });
        call.on("end", () => call.end());
        call.on("error", () => {});
      },
    };
    this.#server.addService(ReportsService, service);
    const bound = await new Promise<number>((resolve, reject) =>
      this.#server.bindAsync(`127.0.0.1:${port}`, ServerCredentials.createInsecure(), (error, taken) =>
        error ? reject(error) : resolve(taken),
      ),
    );
    this.target = `127.0.0.1:${bound}`;
  }

  /** What the last stream said last. */
  get last(): DemandReport | undefined {
    return this.streams.at(-1)?.reports.at(-1)?.report;
  }

  get model(): ModelDemand | undefined {
    return this.last?.models[0];
  }

  kill(): void {
    this.#server.forceShutdown();
  }
}

let bed: Bed;
let reports: ScriptedReports;
const peers: Peer[] = [];
const LIMITS = { changeMs: 30, quietMs: 400, backoffMinMs: 20, backoffMaxMs: 100 };
const CLUSTER = { namespace: "models", deployment: MODEL, replica: "g0" };

async function make(limits: object = {}): Promise<void> {
  reports = new ScriptedReports();
  await reports.start();
  const trust = {
    ...noTrust,
    channel: (peer: Peer) => {
      peers.push(peer);
      return noTrust.channel(peer);
    },
  };
  const demand = { target: reports.target, gateway: "gateway-1", limits: LIMITS };
  bed = await makeBed({ leader: "none", limits, gateway: { demand, trust, readyWithoutModels: true } });
}
afterEach(async () => {
  await bed.stop();
  reports.kill();
  peers.length = 0;
});

const metricUp = async () =>
  /^muster_gateway_demand_stream_up(\{[^}]*\})? 1/m.test((await ask(bed.http, "/metrics")).body);
const body = (more: object = {}) => ({ model: MODEL, prompt: "ab", max_tokens: 20, ignore_eos: true, ...more });

test("D1: held, running, arrivals, failures and latencies are told as they change", async () => {
  await make({ wakeMs: 300 });
  await until(() => reports.last !== undefined);
  expect(reports.last).toEqual({ gateway: "gateway-1", models: [] });
  expect(peers).toContainEqual({ role: "controller" });
  bed.controller.tell([servedModel(undefined, { ...CLUSTER, replica: "", phase: Phase.STOPPED })]);
  await until(async () => (await ask(bed.http, "/v1/models")).body.data.length === 1);
  const failing = ask(bed.http, "/v1/completions", body({ n: 2 }));
  await until(() => reports.model?.held === 2);
  expect(reports.model).toMatchObject({
    namespace: "models",
    deployment: MODEL,
    running: 0,
    arrivals: 2n,
    failures: 0n,
  });
  expect((await failing).status).toBe(503);
  await until(() => reports.model?.failures === 2n);
  expect(reports.model).toMatchObject({ held: 0, running: 0, arrivals: 2n });
  const leader = await bed.launch({ stepMs: 15 });
  bed.controller.tell([servedModel(leader, CLUSTER)]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster.replicas === 1);
  const gone = new AbortController();
  await openSse(bed.http, "/v1/completions", body({ stream: true, max_tokens: 4000 }), gone.signal);
  await until(() => reports.model?.running === 1);
  const said = () => reports.streams[0]?.reports.flatMap(({ report }) => report.models) ?? [];
  await until(() => said().some(({ ttftMs }) => ttftMs > 0));
  gone.abort();
  await until(() => reports.model?.running === 0);
  // A client that went away is no failure, and what is not served here is nobody's demand.
  await ask(bed.http, "/v1/completions", body({ model: "other" }));
  await ask(bed.http, "/v1/completions", body({ tools: [] }));
  await ask(bed.http, "/v1/completions", body());
  await until(() => reports.model?.arrivals === 4n);
  expect(reports.model?.failures).toBe(2n);
  expect(await metricUp()).toBe(true);
});

test("D1: without a change it is told only once in a while", async () => {
  await make();
  await until(() => (reports.streams[0]?.reports.length ?? 0) >= 4, 20_000);
  const [, second, third, fourth] = reports.streams[0]?.reports ?? [];
  for (const [one, next] of [
    [second, third],
    [third, fourth],
  ] as const) {
    // Timers of two processes' ends differ by a few milliseconds.
    expect((next?.atMs ?? 0) - (one?.atMs ?? 0)).toBeGreaterThan(LIMITS.quietMs - 50);
  }
});

test("D2, D3: a controller that goes costs no request; the next stream's counters begin at 0", async () => {
  await make();
  const leader = await bed.launch({ stepMs: 1 });
  bed.controller.tell([servedModel(leader, CLUSTER)]);
  await until(async () => (await ask(bed.http, `/v1/models/${MODEL}`)).body.muster?.replicas === 1);
  await ask(bed.http, "/v1/completions", body());
  await until(() => reports.model?.arrivals === 1n);
  const port = Number(reports.target.split(":")[1]);
  reports.kill();
  await until(async () => !(await metricUp()));
  for (let i = 0; i < 3; i++) expect((await ask(bed.http, "/v1/completions", body())).status).toBe(200);
  await reports.start(port);
  await until(() => reports.streams.length > 1 && reports.last !== undefined);
  expect(reports.last?.models).toEqual([]);
  await ask(bed.http, "/v1/completions", body());
  await until(() => reports.model?.arrivals === 1n);
  expect(await metricUp()).toBe(true);
});

test("models that nobody is to be told of are not told", async () => {
  await make();
  const leader = await bed.launch();
  bed.controller.tell([servedModel(leader)]);
  await until(async () => (await ask(bed.http, "/v1/models")).body.data?.length === 1);
  await ask(bed.http, "/v1/completions", body());
  const before = reports.streams[0]?.reports.length ?? 0;
  await until(() => (reports.streams[0]?.reports.length ?? 0) > before);
  expect(reports.last?.models).toEqual([]);
});

test("latencies are 90th percentiles since they were last taken, of a bounded window", () => {
  const count = new DemandCount();
  expect(count.takeLatencies()).toEqual({ ttftMs: 0, itlMs: 0 });
  for (let ms = 1; ms <= 10; ms++) count.firstToken(ms);
  count.nextToken(3);
  expect(count.takeLatencies()).toEqual({ ttftMs: 9, itlMs: 3 });
  expect(count.takeLatencies()).toEqual({ ttftMs: 0, itlMs: 0 });
  for (let ms = 0; ms < 10_000; ms++) count.firstToken(ms);
  expect(count.takeLatencies().ttftMs).toBeGreaterThanOrEqual(9_900);
});
