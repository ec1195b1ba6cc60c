import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import {
  credentials,
  makeGenericClientConstructor,
  type ServiceDefinition,
  type ServiceError,
  status,
} from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { service as healthService } from "grpc-health-check";
import { describe, expect, test } from "vitest";
import {
  type Chunk,
  Fault_Kind,
  Finish_Reason,
  Open,
  type ScoreChunk,
  type SubmitResponse,
  WorkerPhase,
  type WorkerStats,
} from "../../../proto/gen/muster/v1/worker.ts";
import { EngineError } from "../../../worker/engine/engine.ts";
import { answer, Bench, EOS, tableDefaults } from "./harness.ts";
import {
  failure,
  finishOf,
  folder,
  INCARNATION,
  load,
  loadRequest,
  prompt,
  start,
  submit,
  tokensOf,
} from "./worker-bed.ts";

describe("one worker over a unix socket", () => {
  test("is described, loaded, and serves what a leader in this process serves", async () => {
    const worker = await start(folder());
    const phases = (await load(worker, loadRequest(0, [worker.address]))).map(({ phase }) => phase);
    expect(phases.at(-1)).toBe(WorkerPhase.SERVING);
    const description = await new Promise((done) =>
      worker.client.describe({ incarnation: INCARNATION }, (_, found) => done(found)),
    );
    expect(description).toMatchObject({
      incarnation: INCARNATION,
      worker: 0,
      phase: WorkerPhase.SERVING,
      numericsId: "table-1",
    });
    const texts = ["Mr. Speaker", "The Congress", "We"];
    const chunks = await submit(worker, texts.map(prompt));
    const bench = new Bench({ boost: new Map([[EOS, 1]]) });
    for (const [index, value] of texts.entries()) {
      const expected = answer(await bench.run(prompt(value)));
      const got = chunks.get(index + 1) ?? [];
      expect(got[0]?.opened?.prompt).toEqual(expected.prompt);
      expect(tokensOf(got)).toEqual(expected.tokens);
      expect(got.map(({ text }) => text).join("")).toBe(expected.text);
      expect(finishOf(got)?.reason).toBe(expected.reason);
    }
    await bench.stop();
  });

  test("a second Load joins the first", async () => {
    const worker = await start(folder());
    const request = loadRequest(0, [worker.address]);
    const both = await Promise.all([load(worker, request), load(worker, request)]);
    expect(both.map((seen) => seen.at(-1)?.phase)).toEqual([WorkerPhase.SERVING, WorkerPhase.SERVING]);
    expect((await load(worker, request)).at(-1)?.phase).toBe(WorkerPhase.SERVING);
  });

  test("requests of another incarnation do nothing", async () => {
    const worker = await start(folder());
    const other = INCARNATION + 1n;
    const described = await failure((done) => worker.client.describe({ incarnation: other }, done));
    expect(described?.code).toBe(status.FAILED_PRECONDITION);
    const loaded = load(worker, { ...loadRequest(0, [worker.address]), incarnation: other });
    await expect(loaded).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
    expect(worker.engine).toBeUndefined();
    await load(worker, loadRequest(0, [worker.address]));
    const call = worker.client.submit();
    call.write({ incarnation: other, kind: { $case: "open", value: Open.fromPartial({ id: 1, ...prompt("A") }) } });
    const error = await new Promise<ServiceError>((done) => call.on("error", done).resume());
    expect(error.code).toBe(status.FAILED_PRECONDITION);
    expect(worker.engine?.seen.steps).toBe(0);
  });

  test("a gateway that goes away frees its KV blocks", async () => {
    const worker = await start(folder());
    await load(worker, loadRequest(0, [worker.address]));
    const call = worker.client.submit();
    call.on("error", () => {});
    const open = Open.fromPartial({ id: 1, ...prompt("A"), maxTokens: 390, ignoreEos: true });
    call.write({ incarnation: INCARNATION, kind: { $case: "open", value: open } });
    await new Promise((done) => call.once("data", done).resume());
    call.cancel();
    const stats = worker.client.stats({ incarnation: INCARNATION });
    stats.on("error", () => {});
    const figures: AsyncIterable<WorkerStats> = stats;
    for await (const { running, waiting, kvBlocksFree, kvBlocksTotal } of figures) {
      if (running + waiting === 0 && kvBlocksFree === kvBlocksTotal) break;
    }
  });

  test("scores given tokens with the logits that serving would have used", async () => {
    const worker = await start(folder());
    await load(worker, loadRequest(0, [worker.address]));
    const chunks = await submit(worker, [
      { ...prompt("The state of the Union is strong"), logprobs: 1, ignoreEos: true },
    ]);
    const served = (chunks.get(1) ?? []).flatMap(({ logprobs }) => logprobs.map(({ logprob }) => logprob));
    const promptIds = chunks.get(1)?.[0]?.opened?.prompt ?? [];
    const tokens = [...promptIds, ...(tokensOf(chunks.get(1)) ?? [])];
    const pieces: ScoreChunk[] = [];
    for await (const piece of worker.client.score({ incarnation: INCARNATION, tokens, logits: true }))
      pieces.push(piece);
    const logprobs = pieces.flatMap((piece) => piece.logprobs);
    expect(logprobs.length).toBe(tokens.length - 1);
    for (const [index, logprob] of served.entries())
      expect(logprobs[promptIds.length - 1 + index]).toBeCloseTo(logprob, 3);
    expect(pieces.reduce((sum, { logits }) => sum + logits.length, 0)).toBe(tokens.length * tableDefaults.vocab * 4);
    expect(pieces.map(({ first }) => first)).toEqual(pieces.map((_, index) => index * tableDefaults.tokensMax));
  });

  test("tokenises as Submit does, and says what it refuses", async () => {
    const worker = await start(folder());
    const early = await failure((done) => worker.client.tokenize({ incarnation: INCARNATION, input: undefined }, done));
    expect(early?.code).toBe(status.UNAVAILABLE);
    await load(worker, loadRequest(0, [worker.address]));
    const messages = [{ role: "user", content: "We", name: "" }];
    const input = { $case: "chat" as const, value: { messages } };
    const ids = await new Promise<number[] | undefined>((done) =>
      worker.client.tokenize({ incarnation: INCARNATION, input }, (_, found) => done(found?.ids)),
    );
    const chunks = await submit(worker, [{ ...prompt(""), input }]);
    expect(ids).toEqual(chunks.get(1)?.[0]?.opened?.prompt);
    const scored = async () => {
      for await (const _ of worker.client.score({ incarnation: INCARNATION, tokens: [5000], logits: false }));
    };
    await expect(scored()).rejects.toMatchObject({
      code: status.INVALID_ARGUMENT,
      details: expect.stringContaining("5000"),
    });
  });

  test("drains: what runs ends, nothing new begins", async () => {
    const worker = await start(folder());
    await load(worker, loadRequest(0, [worker.address]));
    const call = worker.client.submit();
    const answers: Chunk[] = [];
    const open = (id: number) =>
      call.write({
        incarnation: INCARNATION,
        kind: { $case: "open", value: Open.fromPartial({ id, ...prompt("A") }) },
      });
    const drained = new Promise<{ ended: number; cut: number } | undefined>((done) => {
      call.on("data", ({ chunks }: SubmitResponse) => {
        answers.push(...chunks);
        if (chunks.some(({ id, opened }) => id === 1 && opened !== undefined))
          worker.client.drain({ incarnation: INCARNATION, timeoutMs: 5_000 }, (_, found) => done(found));
      });
    });
    const ended = new Promise((done) => call.on("end", done));
    open(1);
    expect(await drained).toMatchObject({ ended: 1, cut: 0 });
    open(2);
    call.end();
    await ended;
    expect(answers.find(({ id, finish }) => id === 1 && finish)?.finish?.reason).not.toBe(Finish_Reason.FAULT);
    expect(answers.find(({ id }) => id === 2)?.finish?.fault).toMatchObject({
      kind: Fault_Kind.WAITING,
      code: "draining",
    });
  });

  test("a Load that cannot work says why and leaves the worker there to be asked", async () => {
    const where = folder();
    const worker = await start(where, 0, () => {
      throw new EngineError({ code: "unsupported", field: "tensor 3", detail: "type F8", rank: -1 });
    });
    const seen = await load(worker, loadRequest(0, [worker.address]));
    expect(seen.at(-1)).toMatchObject({
      phase: WorkerPhase.FAILED,
      fault: { kind: Fault_Kind.INVALID, field: "tensor 3" },
    });
    const described = await new Promise((done) =>
      worker.client.describe({ incarnation: INCARNATION }, (_, found) => done(found)),
    );
    expect(described).toMatchObject({ phase: WorkerPhase.FAILED, fault: { detail: "type F8" } });
  });
});

describe("what every gRPC server of Muster serves", () => {
  test("health: the worker's service is SERVING after its Load, not before", async () => {
    const worker = await start(folder());
    const Health = makeGenericClientConstructor(healthService as unknown as ServiceDefinition, "Health");
    const health = new Health(worker.address, credentials.createInsecure());
    const ask = (service: string) =>
      new Promise<string>((done) =>
        health.check?.({ service }, (_: unknown, found: { status: string }) => done(found.status)),
      );
    expect(await ask("")).toBe("SERVING");
    expect(await ask("muster.v1.Worker")).toBe("NOT_SERVING");
    await load(worker, loadRequest(0, [worker.address]));
    expect(await ask("muster.v1.Worker")).toBe("SERVING");
    health.close();
  });

  test("reflection: names the service", async () => {
    const worker = await start(folder());
    const proto = join(
      dirname(createRequire(import.meta.url).resolve("@grpc/reflection")),
      "../proto/grpc/reflection/v1/reflection.proto",
    );
    const definition = loadSync(proto)["grpc.reflection.v1.ServerReflection"];
    const Reflection = makeGenericClientConstructor(definition as ServiceDefinition, "ServerReflection");
    const reflection = new Reflection(worker.address, credentials.createInsecure());
    const call = reflection.ServerReflectionInfo?.();
    const listed = new Promise((done) => call.on("data", done));
    call.write({ listServices: "" });
    expect(JSON.stringify(await listed)).toContain("muster.v1.Worker");
    call.end();
    reflection.close();
  });
});
