// The public gRPC API with a real client.
import { credentials, loadPackageDefinition, Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { afterAll, beforeAll, expect, test } from "vitest";
import { seedOfClient } from "../../../controller/gateway/seed.ts";
import {
  type GenerateOptions,
  type GenerateResponse,
  InferenceClient,
  type ListModelsResponse,
  type ModelInfo,
  type TokenizeResponse,
} from "../../../proto/gen/muster/v1/inference.ts";
import { type Bed, MODEL, makeBed, servedModel, until } from "./bed.ts";
import { chatPromptIds, expectedAnswer, promptIds } from "./scripted-leader.ts";

const KEY = "a-key";
let bed: Bed;
let client: InferenceClient;
const withKey = new Metadata();
withKey.set("authorization", `Bearer ${KEY}`);

beforeAll(async () => {
  bed = await makeBed({ apiKey: KEY });
  client = new InferenceClient(bed.grpc, credentials.createInsecure());
});
afterAll(async () => {
  client.close();
  await bed.stop();
});

const options: GenerateOptions = {
  seed: 9n,
  maxTokens: 20,
  stop: [],
  logprobs: 0,
  ignoreEos: true,
  noSpeculation: true,
};
const rules = { stop: [], maxTokens: 20, ignoreEos: true };
const seeded = (prompt: number[]) => {
  const { low, high } = seedOfClient(9);
  return { prompt, seedLow: low, seedHigh: high };
};

type Stream = AsyncIterable<GenerateResponse>;

async function collect(
  stream: Stream,
): Promise<{ text: string; ids: number[]; first: GenerateResponse; last: GenerateResponse }> {
  const all: GenerateResponse[] = [];
  for await (const response of stream) all.push(response);
  const [first] = all;
  const last = all.at(-1);
  if (!first || !last) throw new Error("nothing came");
  return { text: all.map((each) => each.text).join(""), ids: all.flatMap((each) => each.tokens), first, last };
}

const call = <Response>(send: (respond: (error: ServiceError | null, response: Response) => void) => unknown) =>
  new Promise<Response>((resolve, reject) => {
    send((error, response) => (error ? reject(error) : resolve(response)));
  });

test("Generate streams ids and text, the prompt first, usage last", async () => {
  const expected = expectedAnswer(seeded(promptIds("ab")), rules);
  const input = { $case: "text" as const, value: "ab" };
  const got = await collect(client.generate({ model: MODEL, input, options }, withKey));
  expect(got.text).toBe(expected.text);
  expect(got.ids).toEqual(expected.ids);
  expect(got.first.prompt).toEqual(promptIds("ab"));
  expect(got.last).toMatchObject({
    finishReason: "length",
    usage: { promptTokens: 3, completionTokens: 20, targetSteps: 20 },
  });
  expect(bed.leaders[0]?.opens.at(-1)).toMatchObject({ speculation: false, sampling: { temperature: 0, topP: 1 } });
});

test("Generate takes ids; unset numbers of a given Sampling mean off", async () => {
  const sampling = {
    temperature: 0.5,
    topK: 0,
    topP: 0,
    minP: 0,
    repetitionPenalty: 0,
    presencePenalty: 0,
    frequencyPenalty: 0,
    logitBias: [],
  };
  const input = { $case: "prompt" as const, value: { ids: promptIds("ab") } };
  await collect(client.generate({ model: MODEL, input, options: { ...options, sampling } }, withKey));
  expect(bed.leaders[0]?.opens.at(-1)?.sampling).toMatchObject({ temperature: 0.5, topP: 1, repetitionPenalty: 1 });
});

test("Chat streams, and goes on exactly after its leader's death", async () => {
  const messages = [{ role: "user", content: "hi", name: "" }];
  const expected = expectedAnswer(seeded(chatPromptIds(messages)), rules);
  bed.leaders[0]?.kill();
  const dying = await bed.serve({ dieAfterTokens: 7 });
  const got = collect(client.chat({ model: MODEL, messages, options }, withKey));
  await dying.died;
  await bed.serve();
  expect((await got).text).toBe(expected.text);
  expect((await got).ids).toEqual(expected.ids);
});

test("a cancelled call cancels on the leader", async () => {
  const leader = await bed.serve({ stepMs: 20 });
  const stream = client.generate({ model: MODEL, input: { $case: "text", value: "ab" }, options }, withKey);
  stream.on("error", () => {});
  await until(() => leader.running === 1);
  stream.cancel();
  await until(() => leader.running === 0 && leader.cancels.length === 1);
});

test("Tokenize, ListModels and GetModel", async () => {
  const tokens = await call<TokenizeResponse>((respond) =>
    client.tokenize({ model: MODEL, input: { $case: "text", value: "abc" } }, withKey, respond),
  );
  expect(tokens.ids).toEqual(promptIds("abc"));
  const list = await call<ListModelsResponse>((respond) => client.listModels({}, withKey, respond));
  expect(list.models.map((model) => model.name)).toEqual([MODEL]);
  const model = await call<ModelInfo>((respond) => client.getModel({ model: "nano-alias" }, withKey, respond));
  expect(model).toMatchObject({ name: MODEL, serving: true, contextTokens: 4096 });
});

test("faults are gRPC codes with the field and a stable code", async () => {
  const text = { $case: "text" as const, value: "ab" };
  const unknown = collect(client.generate({ model: "other", input: text, options }, withKey));
  await expect(unknown).rejects.toMatchObject({ code: status.NOT_FOUND, details: /nano/ });
  const missing = collect(client.generate({ model: MODEL, options }, withKey));
  await expect(missing).rejects.toMatchObject({ code: status.INVALID_ARGUMENT, details: /input/ });
  const stops = collect(client.generate({ model: MODEL, input: text, options: { ...options, stop: [""] } }, withKey));
  await expect(stops).rejects.toMatchObject({ code: status.INVALID_ARGUMENT, details: /options.stop/ });
  const noMessages = collect(client.chat({ model: MODEL, messages: [], options }, withKey));
  await expect(noMessages).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
  const get = call<ModelInfo>((respond) => client.getModel({ model: "other" }, withKey, respond));
  await expect(get).rejects.toMatchObject({ code: status.NOT_FOUND });
});

test("without the key every method is refused", async () => {
  const wrong = new Metadata();
  wrong.set("authorization", "Bearer other");
  for (const metadata of [new Metadata(), wrong]) {
    const stream = client.generate({ model: MODEL, input: { $case: "text", value: "ab" }, options }, metadata);
    await expect(collect(stream)).rejects.toMatchObject({ code: status.UNAUTHENTICATED });
    const list = call<ListModelsResponse>((respond) => client.listModels({}, metadata, respond));
    await expect(list).rejects.toMatchObject({ code: status.UNAUTHENTICATED });
  }
});

test("health follows serving", async () => {
  const { service } = await import("grpc-health-check");
  const definition = loadPackageDefinition({ "grpc.health.v1.Health": service });
  expect(definition).toBeDefined();
  const check = () =>
    new Promise<string>((resolve, reject) => {
      client.makeUnaryRequest(
        service.Check?.path ?? "",
        (value: object) => service.Check?.requestSerialize(value) ?? Buffer.alloc(0),
        (bytes: Buffer) => service.Check?.responseDeserialize(bytes) as { status: string },
        { service: "muster.v1.Inference" },
        (error, value) => (error ? reject(error) : resolve(value?.status ?? "")),
      );
    });
  await until(async () => (await check()) === "SERVING");
  bed.controller.tell([servedModel(undefined)]);
  await until(async () => (await check()) === "NOT_SERVING");
  await bed.serve();
  await until(async () => (await check()) === "SERVING");
});
