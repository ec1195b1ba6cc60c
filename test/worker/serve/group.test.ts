import { Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { describe, expect, test } from "vitest";
import {
  type Chunk,
  Fault_Kind,
  Finish_Reason,
  Open,
  type StepDigest,
  StepPlan,
  type SubmitResponse,
} from "../../../proto/gen/muster/v1/worker.ts";
import { POD_UID_HEADER } from "../../../proto/grpc.ts";
import { TableEngine } from "../schedule/table-engine.ts";
import {
  failure,
  finishOf,
  folder,
  INCARNATION,
  load,
  loadRequest,
  type More,
  prompt,
  same,
  start,
  submit,
  tokensOf,
  Worker,
  workers,
} from "./worker-bed.ts";

describe("a worker in a pod", () => {
  const UID = "pod-uid-1";
  const meant = (uid: string): Metadata => {
    const metadata = new Metadata();
    metadata.set(POD_UID_HEADER, uid);
    return metadata;
  };
  const begin = async (podUid?: string): Promise<Worker> => {
    const worker = new Worker(folder(), 0, same, podUid === undefined ? {} : { podUid });
    workers.push(worker);
    await worker.listening;
    return worker;
  };
  const described = (worker: Worker, metadata: Metadata) =>
    new Promise<{ code: number; said: string | undefined }>((done) => {
      let said: string | undefined;
      const call = worker.client.describe({ incarnation: INCARNATION }, metadata, (error) =>
        done({ code: error?.code ?? status.OK, said }),
      );
      call.on("metadata", (heard: Metadata) => (said = heard.get(POD_UID_HEADER)[0]?.toString()));
    });

  test("says which pod it is, and refuses what is meant for another", async () => {
    const worker = await begin(UID);
    expect(await described(worker, meant(UID))).toEqual({ code: status.OK, said: UID });
    expect(await described(worker, new Metadata())).toEqual({ code: status.OK, said: UID });
    expect(await described(worker, meant("other"))).toMatchObject({ code: status.FAILED_PRECONDITION });
  });

  test("a Load for another pod changes nothing; its own is taken", async () => {
    const worker = await begin(UID);
    const request = loadRequest(0, [worker.address]);
    const refused = await failure((done) => worker.client.load(request, meant("other")).on("error", done).resume());
    expect(refused).toMatchObject({ code: status.FAILED_PRECONDITION, details: "this is pod pod-uid-1, not other" });
    expect(worker.engine).toBeUndefined();
    for await (const _ of worker.client.load(request, meant(UID)));
    expect(worker.engine).toBeDefined();
  });

  test("a worker in no pod says nothing and is anybody's who knows its address", async () => {
    const worker = await begin();
    expect(await described(worker, meant("any"))).toEqual({ code: status.OK, said: undefined });
  });
});

describe("a group of two workers", () => {
  const pair = async (tweak = same, more: More = {}) => {
    const where = folder();
    const leader = await start(where, 0, same, more);
    const follower = await start(where, 1, tweak, more);
    const addresses = [leader.address, follower.address];
    await Promise.all([load(leader, loadRequest(0, addresses)), load(follower, loadRequest(1, addresses))]);
    return { leader, follower };
  };

  test("the follower does every step that the leader does", async () => {
    const { leader, follower } = await pair();
    const chunks = await submit(leader, [prompt("A"), prompt("B")]);
    expect(finishOf(chunks.get(1))?.reason).not.toBe(Finish_Reason.FAULT);
    expect(follower.engine?.seen).toEqual(leader.engine?.seen);
    expect(follower.engine?.seen.steps).toBeGreaterThan(0);
  });

  test("a follower that samples something else ends the incarnation; streams end with a lost fault", async () => {
    class Drifting extends TableEngine {
      override async launch(plan: StepPlan) {
        const result = await super.launch(plan);
        return plan.step === 5n ? { ...result, digest: result.digest + 1n } : result;
      }
    }
    const { leader } = await pair((engine) => new Drifting(engine.options));
    const chunks = await submit(leader, [prompt("A")]);
    expect(finishOf(chunks.get(1))?.fault).toMatchObject({ kind: Fault_Kind.LOST, code: "digest_differs" });
    expect(tokensOf(chunks.get(1))?.length).toBeLessThan(5);
    await expect(leader.ended).rejects.toThrow("drifted");
  });

  test("asked to end together, a follower goes on until its leader's sequences have ended", async () => {
    class Slow extends TableEngine {
      override async launch(plan: StepPlan) {
        await new Promise((wake) => setTimeout(wake, 20)); // in all longer than a worker that ends at once takes to end
        return await super.launch(plan);
      }
    }
    const { leader, follower } = await pair((engine) => new Slow(engine.options), { drainMs: 10_000 });
    const call = leader.client.submit();
    call.write({
      incarnation: INCARNATION,
      kind: { $case: "open", value: Open.fromPartial({ id: 1, ...prompt("A") }) },
    });
    call.end();
    const chunks: Chunk[] = [];
    const responses: AsyncIterable<SubmitResponse> = call;
    for await (const response of responses) {
      if (chunks.length === 0) for (const worker of [follower, leader]) worker.stop.abort();
      chunks.push(...response.chunks);
    }
    expect(finishOf(chunks)?.reason).not.toBe(Finish_Reason.FAULT);
    await Promise.all([leader.ended, follower.ended]);
    expect(follower.engine?.seen).toEqual(leader.engine?.seen);
  });

  test("a leader whose follower goes away is lost, also between steps", async () => {
    const { leader, follower } = await pair();
    await submit(leader, [prompt("A")]);
    follower.stop.abort();
    await follower.ended;
    await expect(leader.ended).rejects.toThrow("follower");
  });

  test("a follower whose leader goes away is lost; a stranger's stream changes nothing", async () => {
    const where = folder();
    const follower = await start(where, 1);
    await load(follower, loadRequest(1, ["unix:/nowhere", follower.address]));
    const stranger = follower.client.steps();
    stranger.write(StepPlan.fromPartial({ step: 1n, incarnation: INCARNATION + 1n }));
    const refused = await new Promise<ServiceError>((done) => stranger.on("error", done).resume());
    expect(refused.code).toBe(status.FAILED_PRECONDITION);
    const steps = follower.client.steps();
    steps.on("error", () => {});
    const digest = new Promise<StepDigest>((done) => steps.once("data", done));
    steps.write(StepPlan.fromPartial({ step: 1n, incarnation: INCARNATION }));
    expect(await digest).toMatchObject({ step: 1n, fault: undefined });
    steps.cancel();
    await expect(follower.ended).rejects.toThrow("leader");
  });
});
