// The leader's reports over real gRPC: what it says when, and that it comes back to a controller that was away.
import { Server, ServerCredentials, type ServerDuplexStream, status } from "@grpc/grpc-js";
import { afterEach, expect, test } from "vitest";
import { type GroupReport, ReportsService, type ReportTaken } from "../../../proto/gen/muster/v1/report.ts";
import { Fault_Kind, type LoadRequest, WorkerPhase } from "../../../proto/gen/muster/v1/worker.ts";
import { EngineError } from "../../../worker/engine/engine.ts";
import { until } from "../../until.ts";
import type { TableEngine } from "../schedule/table-engine.ts";
import { folder, INCARNATION, load, loadRequest, prompt, start, submit } from "./worker-bed.ts";

type Call = ServerDuplexStream<GroupReport, ReportTaken>;

/** A controller that hears all, or refuses with `refusal`. */
class Listener {
  readonly reports: GroupReport[] = [];
  readonly calls: Call[] = [];
  refusal: status | undefined;
  #server: Server | undefined;
  port = 0;

  async listen(): Promise<void> {
    const server = new Server();
    server.addService(ReportsService, {
      group: (call: Call) => {
        this.calls.push(call);
        call.on("error", () => {});
        if (this.refusal !== undefined) {
          call.emit("error", { code: this.refusal, details: "no" });
          return;
        }
        call.on("data", (report: GroupReport) => {
          this.reports.push(report);
          call.write({});
        });
        call.on("end", () => call.end());
      },
      demand: () => {},
      inspected: () => {},
    });
    this.port = await new Promise((resolve, reject) =>
      server.bindAsync(`127.0.0.1:${this.port}`, ServerCredentials.createInsecure(), (error, port) =>
        error ? reject(error) : resolve(port),
      ),
    );
    this.#server = server;
    listeners.push(this);
  }

  close(): void {
    this.#server?.forceShutdown();
  }

  get last(): GroupReport | undefined {
    return this.reports.at(-1);
  }
}

const listeners: Listener[] = [];
afterEach(() => {
  for (const listener of listeners.splice(0)) listener.close();
});

const reporting = (request: LoadRequest, { port }: Listener): LoadRequest => ({
  ...request,
  reportsAddress: `127.0.0.1:${port}`,
  namespace: "serving",
  group: "chat-0",
});

/** Two workers of one rank each; the leader reports. */
async function group(listener: Listener, tweak?: (engine: TableEngine) => TableEngine) {
  const where = folder();
  const more = { podUid: "pod-uid" };
  const leader = await start(where, 0, undefined, more);
  const follower = await start(where, 1, tweak);
  const addresses = [leader.address, follower.address];
  const requests = [0, 1].map((index) => {
    const request = loadRequest(index, addresses);
    const ranks = [0, 1].map((rank) => ({ rank, worker: rank }));
    const plan = request.plan && { ...request.plan, ranks: ranks.map((each) => Object.assign(emptyRank(), each)) };
    return reporting({ ...request, plan }, listener);
  });
  await Promise.all([leader, follower].map((worker, index) => load(worker, requests[index] ?? loadRequest(index, []))));
  return { leader, follower };
}

const emptyRank = () => {
  const none = undefined;
  const ranges = { heads: none, kvHeads: none, vocab: none, denseFfn: none, sharedFfn: none, expertFfn: none };
  return { rank: 0, worker: 0, experts: [], ...ranges };
};

test("the first report says who speaks; phases come as they change, steps and figures under load, by rank", async () => {
  const listener = new Listener();
  await listener.listen();
  const { leader } = await group(listener);
  await until(() => listener.last?.phase === WorkerPhase.SERVING, "the leader serves and says so");
  for (const report of listener.reports)
    expect(report).toMatchObject({
      namespace: "serving",
      group: "chat-0",
      incarnation: INCARNATION,
      podUid: "pod-uid",
    });
  expect(listener.reports[0]).toMatchObject({ phase: WorkerPhase.LOADING, stats: undefined, rankEpochs: [] });
  await submit(leader, [prompt("Mr. Speaker,"), prompt("Mr. President,")]);
  await until(() => (listener.last?.rankEpochs.length ?? 0) > 0, "steps are reported");
  await until(() => listener.last?.pending === false, "nothing is pending any more");
  expect(listener.last?.rankEpochs).toHaveLength(2);
  const [own, other] = listener.last?.rankEpochs ?? [];
  expect(own).toBeGreaterThan(0n);
  expect(other).toBe(own);
  expect(listener.last?.stats?.tokensGenerated).toBeGreaterThan(0n);
  expect(listener.last?.stats?.steps).toBe(own);
});

test("a follower that does not finish is behind while its step is pending", async () => {
  const listener = new Listener();
  await listener.listen();
  const held = Promise.withResolvers<void>();
  const slow = (engine: TableEngine): TableEngine => {
    const launch = engine.launch.bind(engine);
    engine.launch = async (plan) => {
      if (plan.step >= 3n) await held.promise;
      return launch(plan);
    };
    return engine;
  };
  const { leader } = await group(listener, slow);
  const answered = submit(leader, [prompt("Mr. Speaker,")]);
  await until(() => listener.last?.pending === true && listener.last.rankEpochs[1] === 2n, "the follower stands still");
  const [own = 0n] = listener.last?.rankEpochs ?? [];
  expect(own).toBeGreaterThan(2n);
  await until(() => (listener.last?.standingMs ?? 0) > 1_200, "T3: for how long is said");
  held.resolve();
  await answered;
  await until(() => listener.last?.pending === false, "all is done");
  expect(listener.last?.standingMs).toBe(0);
});

test("a controller that comes back hears everything anew; one that refuses is asked again later", async () => {
  const listener = new Listener();
  await listener.listen();
  await group(listener);
  await until(() => listener.last?.phase === WorkerPhase.SERVING, "the leader serves");
  listener.close();
  const next = new Listener();
  next.port = listener.port;
  next.refusal = status.UNAVAILABLE;
  await next.listen();
  await until(() => next.calls.length > 1, "it tries again and again");
  next.refusal = undefined;
  await until(() => next.last?.phase === WorkerPhase.SERVING, "the next controller knows it");
  expect(next.reports[0]).toMatchObject({ group: "chat-0", podUid: "pod-uid", phase: WorkerPhase.SERVING });
});

test("why a Load failed is the last word", async () => {
  const listener = new Listener();
  await listener.listen();
  const where = folder();
  const leader = await start(where, 0, () => {
    throw new EngineError({ code: "out_of_memory", field: "plan.kv_blocks", detail: "12 bytes short", rank: -1 });
  });
  await load(leader, reporting(loadRequest(0, [leader.address]), listener));
  await until(() => listener.last?.phase === WorkerPhase.FAILED, "the failure is reported");
  expect(listener.last?.fault).toMatchObject({ kind: Fault_Kind.INVALID, field: "plan.kv_blocks" });
});

test("nobody is told where the Load names nobody, and a follower tells nobody", async () => {
  const listener = new Listener();
  await listener.listen();
  const where = folder();
  const alone = await start(where, 0);
  await load(alone, loadRequest(0, [alone.address]));
  await submit(alone, [prompt("Mr. Speaker,")]);
  expect(listener.calls).toHaveLength(0);
});
