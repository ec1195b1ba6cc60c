import {
  Metadata,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServerWritableStream,
  type sendUnaryData,
  status,
} from "@grpc/grpc-js";
import { expect, onTestFinished, describe as suite, test } from "vitest";
import { identify } from "../../../../controller/kube/workers/worker-identity.ts";
import { GrpcWorkerLinks, type WorkerTarget } from "../../../../controller/kube/workers/worker-link.ts";
import {
  type DescribeRequest,
  type LoadProgress,
  LoadProgress as LoadProgressMessage,
  LoadRequest,
  type WorkerDescription,
  WorkerPhase,
  WorkerService,
} from "../../../../proto/gen/muster/v1/worker.ts";
import { POD_UID_HEADER } from "../../../../proto/grpc.ts";
import { describe } from "../../reconcile/groups.ts";

const never = new AbortController().signal;

type Behaviour = {
  uid?: string;
  description?: WorkerDescription;
  /** Answers nothing. */
  isMute?: boolean;
  onLoad?: (call: ServerWritableStream<LoadRequest, LoadProgress>) => void;
};

/** A worker's gRPC server on loopback; answers its target. */
async function worker({ uid, description = describe(0), isMute, onLoad }: Behaviour): Promise<string> {
  const server = new Server();
  server.addService(WorkerService, {
    describe: (
      call: ServerUnaryCall<DescribeRequest, WorkerDescription>,
      answer: sendUnaryData<WorkerDescription>,
    ): void => {
      if (isMute) return;
      const metadata = new Metadata();
      if (uid !== undefined) metadata.set(POD_UID_HEADER, uid);
      call.sendMetadata(metadata);
      answer(null, description);
    },
    load: (call: ServerWritableStream<LoadRequest, LoadProgress>) => onLoad?.(call),
  });
  const port = await new Promise<number>((done, fail) =>
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, bound) =>
      error ? fail(error) : done(bound),
    ),
  );
  onTestFinished(() => server.forceShutdown());
  return `127.0.0.1:${port}`;
}

const targetOf = (address: string, uid = "uid-1"): WorkerTarget => ({
  name: { group: "serving/a", incarnation: 3n, worker: 0 },
  uid,
  address,
});

function linksOf(onNews: () => void = () => {}): GrpcWorkerLinks {
  const links = new GrpcWorkerLinks({ onNews });
  onTestFinished(() => links.close());
  return links;
}

suite("GrpcWorkerLinks", () => {
  test("a worker says what it does and which pod it is", async () => {
    const target = targetOf(await worker({ uid: "uid-1" }));
    const answer = await linksOf().describe(target, never);
    expect(answer).toEqual({ kind: "answered", uid: "uid-1", description: describe(0) });
    expect(identify(target, answer)).toEqual({ kind: "described", description: describe(0) });
  });

  test("N2: a worker that is not there or does not answer is silent within the bound, and says why", async () => {
    const links = linksOf();
    const refused = await links.describe(targetOf("127.0.0.1:1"), never);
    expect(refused).toMatchObject({ kind: "silent", detail: expect.stringContaining("ECONNREFUSED") });
    const begunMs = Date.now();
    const mute = await links.describe(targetOf(await worker({ isMute: true }), "uid-2"), never);
    expect(mute).toMatchObject({ kind: "silent", detail: expect.stringContaining("eadline") });
    expect(Date.now() - begunMs).toBeLessThan(3_000);
  });

  test("an aborted look ends at once", async () => {
    const links = linksOf();
    const address = await worker({ isMute: true });
    const stop = new AbortController();
    const answer = links.describe(targetOf(address), stop.signal);
    stop.abort();
    expect(await answer).toMatchObject({ kind: "silent" });
  });

  test("a Load is taken at its first word, is sent once while it runs, and every word is news", async () => {
    let loads = 0;
    let news = 0;
    const uids: unknown[] = [];
    const address = await worker({
      onLoad: (call) => {
        loads += 1;
        uids.push(call.metadata.get(POD_UID_HEADER)[0]);
        call.write(LoadProgressMessage.create({ phase: WorkerPhase.LOADING }));
      },
    });
    const links = linksOf(() => {
      news += 1;
    });
    const request = LoadRequest.create({ incarnation: 3n });
    await links.load(targetOf(address), request, never);
    await links.load(targetOf(address), request, never);
    expect({ loads, news, uids }).toEqual({ loads: 1, news: 1, uids: ["uid-1"] });
    links.forget("uid-1");
    await links.load(targetOf(address), request, never);
    expect(loads).toBe(2);
  });

  test("a Load that is refused is an error, and may be tried again", async () => {
    let loads = 0;
    const address = await worker({
      onLoad: (call) => {
        loads += 1;
        call.emit("error", { code: status.FAILED_PRECONDITION, details: "incarnation 4 runs here" });
      },
    });
    const links = linksOf();
    for (const _ of [1, 2]) {
      const load = links.load(targetOf(address), LoadRequest.create({ incarnation: 3n }), never);
      await expect(load).rejects.toThrow("incarnation 4 runs here");
    }
    expect(loads).toBe(2);
  });
});

suite("identify", () => {
  const target = targetOf("10.0.0.1:7070");
  const answered = (uid: string | undefined, changes: Partial<WorkerDescription> = {}) =>
    identify(target, { kind: "answered", uid, description: describe(0, changes) });

  test("P6: an answer of another pod, incarnation or worker is refused with what is wrong", () => {
    expect(answered("uid-1").kind).toBe("described");
    expect(answered("uid-9")).toMatchObject({
      detail: expect.stringContaining("the address belongs to another pod now"),
    });
    expect(answered(undefined)).toMatchObject({ detail: expect.stringContaining("does not say which pod it is") });
    expect(answered("uid-1", { incarnation: 2n })).toMatchObject({
      detail: expect.stringContaining("of incarnation 2"),
    });
    expect(answered("uid-1", { worker: 1 })).toMatchObject({ detail: expect.stringContaining("worker 1 of") });
    for (const wrong of [answered("uid-9"), answered(undefined), answered("uid-1", { incarnation: 2n })])
      expect(wrong.kind).toBe("refused");
  });
});
