// The Reports service over real gRPC on loopback: who is heard, who is refused and why, and what ends with a term.
import { type ClientDuplexStream, credentials, type ServiceError, status } from "@grpc/grpc-js";
import { expect, onTestFinished, test } from "vitest";
import { LABELS } from "../../../../controller/api/meta.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { systemClock } from "../../../../controller/kube/api/clock.ts";
import { KubeMetrics } from "../../../../controller/kube/metrics/metrics.ts";
import { LoadSamples } from "../../../../controller/kube/owners/load-samples.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { type Inspections, listenReports, Reports } from "../../../../controller/kube/workers/reports.ts";
import { ReportsBoard } from "../../../../controller/kube/workers/reports-board.ts";
import {
  DemandReport,
  GroupReport,
  InspectedPart,
  ReportsClient,
  type ReportTaken,
} from "../../../../proto/gen/muster/v1/report.ts";
import { WorkerPhase } from "../../../../proto/gen/muster/v1/worker.ts";
import { until } from "../../../until.ts";

const GROUP = "serving/chat-0";

function groupObject(incarnation: number, version: string, begun = true): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ReplicaGroup",
    metadata: { name: "chat-0", namespace: "serving", uid: "group-uid", resourceVersion: version },
    spec: { owner: { kind: "ModelDeployment", name: "chat" }, plan: "chat-1", ordinal: 0 },
    status: { record: { incarnation, revision: "r", begun, failures: [], restarts: 0 } },
  };
}

function podObject(incarnation: number, worker: number): KubeObject {
  const name = `chat-0-${incarnation}-${worker}`;
  return {
    apiVersion: "v1",
    kind: "Pod",
    metadata: {
      name,
      namespace: "serving",
      uid: name,
      resourceVersion: "1",
      labels: {
        [LABELS.group]: "chat-0",
        [LABELS.incarnation]: String(incarnation),
        [LABELS.worker]: String(worker),
      },
      ownerReferences: [{ apiVersion: "muster.dev/v1alpha1", kind: "ReplicaGroup", name: "chat-0", uid: "group-uid" }],
    },
    spec: { nodeName: "gpu-1", containers: [] },
    status: { phase: "Running" },
  };
}

const report = (changes: Partial<GroupReport> = {}): GroupReport =>
  GroupReport.fromPartial({
    namespace: "serving",
    group: "chat-0",
    incarnation: 3n,
    podUid: "chat-0-3-0",
    phase: WorkerPhase.SERVING,
    rankEpochs: [4n, 4n],
    ...changes,
  });

type GroupStream = ClientDuplexStream<GroupReport, ReportTaken>;

class Service {
  readonly board = new ReportsBoard(systemClock.nowMs);
  readonly loads = new LoadSamples({ clock: systemClock, board: this.board });
  readonly metrics = new KubeMetrics();
  readonly groups = new Store();
  readonly pods = new Store();
  readonly reports: Reports;
  readonly #clients: ReportsClient[] = [];
  #port = 0;

  private constructor(inspections?: Inspections) {
    const { board, loads, metrics } = this;
    this.reports = new Reports({ board, loads, metrics, ...(inspections === undefined ? {} : { inspections }) });
  }

  static async start(inspections?: Inspections): Promise<Service> {
    const service = new Service(inspections);
    const { port, close } = await listenReports(service.reports, { listen: "127.0.0.1:0" });
    service.#port = port;
    service.groups.replace([groupObject(3, "10")], "10");
    service.pods.replace([podObject(3, 0), podObject(3, 1), podObject(2, 0)], "10");
    onTestFinished(() => {
      for (const client of service.#clients) client.close();
      close();
    });
    return service;
  }

  /** A term, until aborted. */
  lead(): { stop: AbortController; done: Promise<void> } {
    const stop = new AbortController();
    const { groups, pods } = this;
    const done = this.reports.part({ stores: { groups, pods }, term: { signal: stop.signal } });
    onTestFinished(() => stop.abort());
    return { stop, done };
  }

  client(): ReportsClient {
    const client = new ReportsClient(`127.0.0.1:${this.#port}`, credentials.createInsecure());
    this.#clients.push(client);
    return client;
  }

  /** A stream, how often it was answered, and the status it ended with. */
  group(): { call: GroupStream; ended: Promise<ServiceError>; taken: () => number } {
    const call = this.client().group();
    let count = 0;
    call.on("data", () => count++);
    const ended = new Promise<ServiceError>((resolve) => call.on("error", resolve));
    return { call, ended, taken: () => count };
  }

  async refused(said: GroupReport): Promise<ServiceError> {
    const { call, ended } = this.group();
    call.write(said);
    return ended;
  }
}

/** Taken and known. */
async function heard(service: Service): Promise<ReturnType<Service["group"]>> {
  const stream = service.group();
  stream.call.write(report());
  await until(() => stream.taken() > 0, "the report is taken");
  return stream;
}

test("R1: who does not lead hears nobody; with the term every stream ends, and its memory", async () => {
  const service = await Service.start();
  expect(await service.refused(report())).toMatchObject({ code: status.UNAVAILABLE });
  const { stop, done } = service.lead();
  await until(() => service.groups.isSynced, "the stores are whole");
  const { ended } = await heard(service);
  expect(service.board.stepsOf(GROUP, 3n)).toMatchObject({ epochs: [4n, 4n], isHeard: true, isPending: false });
  stop.abort();
  await done;
  expect(await ended).toMatchObject({ code: status.UNAVAILABLE });
  expect(service.board.stepsOf(GROUP, 3n)).toBeUndefined();
  expect(service.metrics.samples()).toContainEqual(
    expect.objectContaining({ name: "muster_report_streams", labels: { kind: "group" }, value: 0 }),
  );
});

test("R2: incarnation, pod and names are checked, and the refusal names the field", async () => {
  const service = await Service.start();
  service.lead();
  const cases: [Partial<GroupReport>, status, string][] = [
    [
      { incarnation: 2n, podUid: "chat-0-2-0" },
      status.FAILED_PRECONDITION,
      "incarnation: serving/chat-0 is at 3, this is 2",
    ],
    [{ incarnation: 4n }, status.FAILED_PRECONDITION, "incarnation:"],
    [{ podUid: "chat-0-3-1" }, status.FAILED_PRECONDITION, "pod_uid: chat-0-3-1 is not the leader's pod"],
    [{ podUid: "chat-0-2-0" }, status.FAILED_PRECONDITION, "pod_uid:"],
    [{ podUid: "unknown" }, status.FAILED_PRECONDITION, "pod_uid:"],
    [{ group: "other" }, status.FAILED_PRECONDITION, "group: there is no ReplicaGroup serving/other"],
    [{ group: "" }, status.INVALID_ARGUMENT, "group: is needed"],
    [{ namespace: "n".repeat(300) }, status.INVALID_ARGUMENT, "namespace: is longer than 253"],
    [{ rankEpochs: Array.from({ length: 2_000 }, () => 1n) }, status.INVALID_ARGUMENT, "rank_epochs: 2000 ranks"],
  ];
  for (const [changes, code, text] of cases) {
    const error = await service.refused(report(changes));
    expect(error.code, text).toBe(code);
    expect(error.details).toContain(text);
  }
  expect(service.board.stepsOf(GROUP, 3n)).toBeUndefined();
});

test("R2: the stream of an incarnation ends with the first report after the record has moved on", async () => {
  const service = await Service.start();
  service.lead();
  const { call, ended } = await heard(service);
  service.groups.learn(groupObject(4, "11", false));
  call.write(report({ rankEpochs: [5n, 5n] }));
  expect(await ended).toMatchObject({ code: status.FAILED_PRECONDITION });
  expect(service.board.stepsOf(GROUP, 3n)).toMatchObject({ epochs: [4n, 4n], isHeard: false });
});

test("R3: a newer stream of the group takes the place of the one before, and its end is not the newer one's", async () => {
  const service = await Service.start();
  service.lead();
  const first = await heard(service);
  const second = await heard(service);
  expect(await first.ended).toMatchObject({ code: status.ABORTED });
  expect(service.board.stepsOf(GROUP, 3n)?.isHeard).toBe(true);
  second.call.cancel();
  await until(() => service.board.stepsOf(GROUP, 3n)?.isHeard === false, "the loss is noticed");
});

test("one stream speaks of one group", async () => {
  const service = await Service.start();
  service.lead();
  const other = groupObject(3, "12");
  service.groups.learn({ ...other, metadata: { ...other.metadata, name: "chat-1", uid: "other-uid" } });
  const pod = podObject(3, 0);
  const ownerReferences = pod.metadata.ownerReferences?.map((each) => ({ ...each, uid: "other-uid" })) ?? [];
  const metadata = { ...pod.metadata, name: "chat-1-3-0", uid: "chat-1-3-0", ownerReferences };
  service.pods.learn({ ...pod, metadata });
  const { call, ended } = await heard(service);
  call.write(report({ group: "chat-1", podUid: "chat-1-3-0" }));
  expect(await ended).toMatchObject({ code: status.INVALID_ARGUMENT });
});

test("gateways are heard while they lead, and what they say goes with their stream", async () => {
  const service = await Service.start();
  service.lead();
  const call = service.client().demand();
  let taken = 0;
  call.on("data", () => taken++);
  call.on("error", () => {}); // ended by cancel
  const models = [{ namespace: "serving", deployment: "chat", held: 2, running: 3, arrivals: 5n }];
  call.write(DemandReport.fromPartial({ gateway: "g", models }));
  await until(() => taken > 0, "the demand is taken");
  expect(service.loads.of("serving/chat")).toMatchObject([{ queue: 2, running: 3, arrivals: 5, serving: 0 }]);
  call.cancel();
  await until(() => service.loads.gateways === 0, "the gateway is forgotten");
  const bad = service.client().demand();
  const ended = new Promise<ServiceError>((resolve) => bad.on("error", resolve));
  bad.write(DemandReport.fromPartial({ models: [{ namespace: "serving" }] }));
  expect(await ended).toMatchObject({ code: status.INVALID_ARGUMENT, details: "models.deployment: is needed" });
});

test("what inspect pods find is handed on in order; where nobody takes it, it is refused", async () => {
  const none = await Service.start();
  none.lead();
  const send = (service: Service) =>
    new Promise<ServiceError | null>((resolve) => {
      const call = service.client().inspected((error) => resolve(error));
      for (const name of ["a", "b"])
        call.write(InspectedPart.fromPartial({ inspection: "i", kind: { $case: "file", value: { name } } }));
      call.end();
    });
  expect(await send(none)).toMatchObject({ code: status.UNIMPLEMENTED });
  const names: string[] = [];
  const some = await Service.start({
    take: async ({ kind }) => void names.push(kind?.$case === "file" ? kind.value.name : "?"),
  });
  some.lead();
  expect(await send(some)).toBeNull();
  expect(names).toEqual(["a", "b"]);
});
