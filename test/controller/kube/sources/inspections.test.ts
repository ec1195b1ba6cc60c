// Inspect pods: made once, heard only while they are under way, bounded, tried again; and what they say through a real server.
import { Server, ServerCredentials, type ServerReadableStream, type sendUnaryData } from "@grpc/grpc-js";
import { describe, expect, test } from "vitest";
import { look, partsOf, sendInspected } from "../../../../controller/cli/inspect.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf, listOf } from "../../../../controller/kube/api/fields.ts";
import { modelDeployments, pods as podResource } from "../../../../controller/kube/api/resources.ts";
import type { WorkerTemplate } from "../../../../controller/kube/groups/pods.ts";
import { type InspectOrder, inspectPod, inspectPodName } from "../../../../controller/kube/sources/inspect-pod.ts";
import { type InspectionLimits, Inspections } from "../../../../controller/kube/sources/inspections.ts";
import { RecordingParts } from "../../../../controller/kube/sources/recording-parts.ts";
import { Reflector } from "../../../../controller/kube/watch/reflector.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { readModel } from "../../../../controller/model/model.ts";
import { recordedSource } from "../../../../controller/model/sources/recorded.ts";
import { FaultError, invalid, transient } from "../../../../proto/fault.ts";
import { InspectedPart, ReportsService, type ReportTaken } from "../../../../proto/gen/muster/v1/report.ts";
import { channelOptions } from "../../../../proto/grpc.ts";
import { noTrust } from "../../../../proto/trust.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";

const NS = "serving";
const { signal: never } = new AbortController();
const TEMPLATE: WorkerTemplate = {
  image: "muster/worker@sha256:0",
  imagePullPolicy: "IfNotPresent",
  command: ["muster"],
  serviceAccountName: "muster-worker",
  port: 7070,
  shmSize: "1Gi",
  resources: { requests: {}, limits: {} },
  drainSeconds: 2,
  tokenSeconds: 3600,
  caConfigMap: undefined,
  userId: 10_001,
};

type Said = NonNullable<InspectedPart["kind"]>;
const whole = await look("builtin://nano-draft", never).then((found) => [...partsOf(found)]);

class Desk {
  readonly time = new VirtualClock();
  readonly server = new SimApiServer(this.time);
  readonly pods = new Store();
  readonly stop = new AbortController();
  readonly changed: string[] = [];
  readonly inspections: Inspections;
  owner: KubeObject = { apiVersion: "", kind: "", metadata: { name: "" } };

  constructor(limits: Partial<InspectionLimits> = {}) {
    const onChange = ({ metadata }: KubeObject) => void this.changed.push(metadata.name);
    const common = { api: this.server, pods: this.pods, clock: this.time, random: () => 0.5, onChange, limits };
    this.inspections = new Inspections(
      { ...common, template: TEMPLATE, target: { to: "leader:7441" } },
      this.stop.signal,
    );
  }

  static async create(limits: Partial<InspectionLimits> = {}): Promise<Desk> {
    const desk = new Desk(limits);
    const { server, pods: store, time: clock, stop } = desk;
    void new Reflector({ api: server, resource: podResource, store, clock, random: () => 0.5 }).run(stop.signal);
    desk.owner = await server.create(modelDeployments, deployment("claimed"), never);
    await desk.settle();
    return desk;
  }

  order(url = "pvc://weights/nano"): InspectOrder {
    return { owner: this.owner, source: { url, secret: undefined }, pods: {}, nodes: ["a", "b"] };
  }

  async settle(): Promise<void> {
    await this.time.runFor(10);
  }

  async pod(url?: string): Promise<KubeObject | undefined> {
    return this.server.get(podResource, inspectPodName(this.order(url)), NS, never);
  }

  async say(kinds: readonly Said[], url?: string): Promise<void> {
    const { name = "", uid = "" } = (await this.pod(url))?.metadata ?? {};
    for (const kind of kinds) this.inspections.take({ namespace: NS, inspection: name, podUid: uid, kind });
    await this.settle();
  }

  async end(exitCode: number, message: string): Promise<void> {
    const pod = await this.pod();
    if (pod === undefined) throw new Error("there is no pod");
    const containerStatuses = [{ name: "inspect", state: { terminated: { exitCode, reason: "Error", message } } }];
    await this.server.replaceStatus(podResource, { ...pod, status: { phase: "Failed", containerStatuses } }, never);
    await this.settle();
  }

  async close(): Promise<void> {
    this.stop.abort();
    await this.inspections.idle();
  }
}

function deployment(name: string): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ModelDeployment",
    metadata: { name, namespace: NS },
    spec: { model: { source: "pvc://weights/nano" } },
  };
}

describe("the pod", () => {
  test("I1, I2: restricted, no GPU, only on nodes of the wish, with claim and secret and nothing else", async () => {
    const desk = await Desk.create();
    const secret = { name: "hub", key: "token" };
    const order = { ...desk.order(), source: { url: "pvc://weights/nano", secret } };
    const spec = fieldsOf(inspectPod(order, { ...TEMPLATE, enrol: "leader:7442" }, { to: "leader:7441" }).spec);
    const container = fieldsOf(listOf(spec.containers)[0]);
    expect(container.args).toEqual([
      ...["pvc://weights/nano", "--to", "leader:7441", "--identity", "/var/run/muster", "--enrol", "leader:7442"],
    ]);
    expect(JSON.stringify(container.resources)).not.toContain("nvidia");
    expect(container.securityContext).toEqual({
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ["ALL"] },
    });
    expect(JSON.stringify(spec.affinity)).toContain('"values":["b"]');
    expect(listOf(container.env)).toContainEqual({
      name: "MUSTER_SOURCE_TOKEN",
      valueFrom: { secretKeyRef: { name: "hub", key: "token" } },
    });
    expect(listOf(spec.volumes)).toContainEqual({
      name: "claim",
      persistentVolumeClaim: { claimName: "weights", readOnly: true },
    });
    expect(spec).toMatchObject({ restartPolicy: "Never", activeDeadlineSeconds: 600 });
    await desk.close();
  });
});

describe("inspections", () => {
  test("J1: one pod is made for a source, and gone when all has come; the same question needs no other", async () => {
    const desk = await Desk.create();
    expect(desk.inspections.lookAt(desk.order(), "q1").kind).toBe("waiting");
    await desk.settle();
    expect(desk.inspections.lookAt(desk.order(), "q1").kind).toBe("waiting");
    const pod = await desk.pod();
    expect(pod?.metadata.ownerReferences?.[0]?.uid).toBe(desk.owner.metadata.uid);
    await desk.say(whole);
    expect(await desk.pod()).toBeUndefined();
    expect(desk.changed).toContain("claimed");
    const seen = desk.inspections.lookAt(desk.order(), "q1");
    if (seen.kind !== "ready") throw new Error(`it is ${seen.kind}`);
    const model = await readModel("x", { headersOnly: true, tokenizer: true, place: recordedSource(seen.recording) });
    expect(model.digest).toBe((await readModel("builtin://nano-draft", { headersOnly: true })).digest);
    expect(desk.inspections.lookAt(desk.order()).kind).toBe("ready");
    // A plan names the source by what the place calls itself.
    expect(desk.inspections.lookAt(desk.order(seen.recording.url)).kind).toBe("ready");
    await desk.close();
  });

  test("a new question looks anew", async () => {
    const desk = await Desk.create();
    desk.inspections.lookAt(desk.order(), "q1");
    await desk.settle();
    await desk.say(whole);
    expect(desk.inspections.lookAt(desk.order(), "q2").kind).toBe("waiting");
    await desk.settle();
    expect(await desk.pod()).toBeDefined();
    await desk.close();
  });

  test("J2: parts of any other pod are refused", async () => {
    const desk = await Desk.create();
    desk.inspections.lookAt(desk.order(), "q1");
    await desk.settle();
    const part = { namespace: NS, inspection: inspectPodName(desk.order()), podUid: "another", kind: whole[0] };
    expect(() => desk.inspections.take(InspectedPart.fromPartial(part))).toThrow(FaultError);
    await desk.say(whole);
    await expect(desk.say(whole)).rejects.toThrow(/nobody waits/);
    await desk.close();
  });

  test("J4: what the pod said last is said, and a new one is made after a while", async () => {
    const desk = await Desk.create();
    desk.inspections.lookAt(desk.order(), "q1");
    await desk.settle();
    const first = (await desk.pod())?.metadata.uid;
    await desk.end(1, "muster inspect: no route to host");
    const seen = desk.inspections.lookAt(desk.order(), "q1");
    if (seen.kind !== "failed") throw new Error(`it is ${seen.kind}`);
    expect(seen.text).toContain("ended with code 1: muster inspect: no route to host");
    await desk.time.runUntil(seen.againMs + 1);
    expect(desk.inspections.lookAt(desk.order(), "q1").kind).toBe("waiting");
    await desk.settle();
    expect((await desk.pod())?.metadata.uid).not.toBe(first);
    await desk.end(1, "again");
    const again = desk.inspections.lookAt(desk.order(), "q1");
    if (again.kind !== "failed") throw new Error(`it is ${again.kind}`);
    expect(again.againMs - desk.time.nowMs()).toBeGreaterThan(seen.againMs - desk.time.nowMs());
    await desk.close();
  });

  test("a source that is wrong is refused with its field, one that does not answer is tried again", async () => {
    const desk = await Desk.create();
    desk.inspections.lookAt(desk.order(), "q1");
    await desk.settle();
    await desk.say([{ $case: "fault", value: invalid("config.json", "is not there") }]);
    expect(desk.inspections.lookAt(desk.order(), "q1")).toMatchObject({
      kind: "refused",
      fault: { field: "config.json" },
    });
    desk.inspections.lookAt(desk.order(), "q2");
    await desk.settle();
    await desk.say([{ $case: "fault", value: transient("source_unreachable", "broke off") }]);
    expect(desk.inspections.lookAt(desk.order(), "q2")).toMatchObject({ kind: "failed", text: "broke off" });
    await desk.close();
  });

  test("a pod that stays too long is ended, with what it waits for", async () => {
    const desk = await Desk.create();
    desk.inspections.lookAt(desk.order(), "q1");
    await desk.time.runFor(631_000);
    expect(await desk.pod()).toBeUndefined();
    const seen = desk.inspections.lookAt(desk.order(), "q1");
    expect(seen).toMatchObject({ kind: "failed", text: expect.stringContaining("has not ended in 10 minutes") });
    await desk.close();
  });

  test("J1, J3: pods, bytes and ages are bounded; the longest unused goes first", async () => {
    const bytes = whole.reduce((sum, each) => sum + (each.$case === "bytes" ? each.value.data.length : 0), 0);
    const desk = await Desk.create({ podsMax: 1, keptBytesMax: 2.5 * bytes, keptMs: 60_000 });
    const urls = ["pvc://one/x", "pvc://two/x", "pvc://three/x"];
    for (const url of urls) {
      desk.inspections.lookAt(desk.order(url), "q");
      await desk.settle();
      const other = desk.inspections.lookAt(desk.order("pvc://other/x"), "q");
      expect(other).toMatchObject({ kind: "failed", text: expect.stringContaining("other sources") });
      await desk.say(whole, url);
    }
    const kinds = [...urls].reverse().map((url) => desk.inspections.lookAt(desk.order(url)).kind);
    expect(kinds).toEqual(["ready", "ready", "waiting"]);
    await desk.time.runFor(60_001);
    expect(desk.inspections.lookAt(desk.order(urls[2])).kind).not.toBe("ready");
    await desk.close();
  });
});

describe("parts", () => {
  const refused: [string, Said[], RegExp][] = [
    ["bytes before a file", [{ $case: "bytes", value: { offset: 0n, data: Buffer.alloc(1) } }], /belong to no file/],
    ["an end before the source", [{ $case: "end", value: { files: 0, bytes: 0n } }], /first part is missing/],
    [
      "bytes beyond the file's end",
      [
        { $case: "file", value: { name: "a", bytes: 4n, etag: "" } },
        { $case: "bytes", value: { offset: 2n, data: Buffer.alloc(3) } },
      ],
      /ends at 4/,
    ],
    [
      "a file twice",
      [
        { $case: "file", value: { name: "a", bytes: 4n, etag: "" } },
        { $case: "file", value: { name: "a", bytes: 4n, etag: "" } },
      ],
      /twice/,
    ],
    ["an end without what was sent", [...whole.slice(0, -2), ...whole.slice(-1)], /have come/],
  ];
  test.each(refused)("%s is refused", (_, kinds, message) => {
    const parts = new RecordingParts();
    expect(() => {
      for (const kind of kinds) parts.take(InspectedPart.fromPartial({ kind }));
    }).toThrow(message);
  });

  test("more bytes than headers ever have are refused", () => {
    const parts = new RecordingParts();
    const data = Buffer.alloc(16 * 1024 * 1024);
    const take = (kind: Said) => parts.take({ namespace: "", inspection: "", podUid: "", kind });
    take({ $case: "file", value: { name: "a", bytes: 1n << 40n, etag: "" } });
    expect(() => {
      for (let index = 0; index < 9; index++)
        take({ $case: "bytes", value: { offset: BigInt(index * data.length), data } });
    }).toThrow(/bytes of headers/);
  });
});

test("over gRPC: the recording that a server takes in gives the same model", async () => {
  const parts = new RecordingParts();
  const taken = Promise.withResolvers<unknown>();
  const server = new Server(channelOptions);
  const inspected = (call: ServerReadableStream<InspectedPart, ReportTaken>, callback: sendUnaryData<ReportTaken>) => {
    call.on("data", (part: InspectedPart) => {
      const said = parts.take(part);
      if (said.kind !== "more") taken.resolve(said);
    });
    call.on("end", () => callback(null, {}));
  };
  const none = () => {};
  server.addService(ReportsService, { inspected, group: none, demand: none });
  const port = await new Promise<number>((done, fail) =>
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, bound) =>
      error === null ? done(bound) : fail(error),
    ),
  );
  try {
    const me = { namespace: NS, inspection: "x", podUid: "1" };
    const found = await look("builtin://nano-maverick-q8_0", never);
    await sendInspected(partsOf(found), { me, to: `127.0.0.1:${port}`, trust: noTrust, signal: never });
    const said = await taken.promise;
    expect(said).toMatchObject({ kind: "whole", recording: found });
  } finally {
    server.forceShutdown();
  }
});
