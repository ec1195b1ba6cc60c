// A client of an installation: asks one door over OpenAI HTTP, as a whole and as a stream, and over gRPC, and compares what comes
// with the golden tokens and text of nano-maverick.
import { credentials, Metadata } from "@grpc/grpc-js";
import { expect } from "vitest";
import { z } from "zod";
import { type GenerateResponse, InferenceClient } from "../../../proto/gen/muster/v1/inference.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { chunksOf } from "../../controller/gateway/sse-client.ts";
import type { Door } from "./installation.ts";
import { goldenPrompts } from "./serving.ts";

const MODEL = "nano";
const Usage = z.looseObject({ drafted: z.number(), accepted: z.number(), target_steps: z.number() });
const Whole = z.looseObject({
  choices: z.tuple([z.looseObject({ text: z.string(), muster: z.looseObject({ token_ids: z.array(z.number()) }) })]),
  usage: z.looseObject({ muster: Usage }),
});
/** Draft tokens that were verified, and that counted. */
export type Drafts = { drafted: number; accepted: number };

export class Client {
  readonly door: Door;
  readonly #key: string;

  constructor(door: Door, key: string) {
    this.door = door;
    this.#key = key;
  }

  async post(body: object): Promise<Response> {
    const headers = { "content-type": "application/json", authorization: `Bearer ${this.#key}` };
    return await fetch(`${this.door.url}/v1/completions`, { method: "POST", headers, body: JSON.stringify(body) });
  }

  async get(path: string): Promise<Response> {
    return await fetch(this.door.url + path, { headers: { authorization: `Bearer ${this.#key}` } });
  }

  /** Asks for every golden prompt, one after the other; each answer must be the golden one. */
  async expectGolden(): Promise<Drafts> {
    const drafts = { drafted: 0, accepted: 0 };
    for (const { prompt, greedy, text } of goldenPrompts()) {
      const response = await this.post(bodyOf(prompt, greedy.length));
      const said = await response.text();
      const body = Whole.safeParse(response.ok ? JSON.parse(said) : undefined);
      if (!body.success) throw new Error(`${this.door.name} answered ${response.status}: ${said}`);
      const [choice] = body.data.choices;
      expect({ tokens: choice.muster.token_ids, text: choice.text }, this.door.name).toEqual({ tokens: greedy, text });
      drafts.drafted += body.data.usage.muster.drafted;
      drafts.accepted += body.data.usage.muster.accepted;
    }
    return drafts;
  }

  async expectGoldenStreams(): Promise<void> {
    for (const { prompt, greedy, text } of goldenPrompts()) {
      const got = await chunksOf(await this.post({ ...bodyOf(prompt, greedy.length), stream: true }));
      expect(got, this.door.name).toMatchObject({
        isDone: true,
        error: undefined,
        finish: "length",
        ids: greedy,
        text,
      });
    }
  }

  async expectGoldenOverGrpc(): Promise<void> {
    const client = new InferenceClient(this.door.grpc, credentials.createInsecure(), channelOptions);
    const metadata = new Metadata();
    metadata.set("authorization", `Bearer ${this.#key}`);
    try {
      for (const { prompt, greedy, text } of goldenPrompts()) {
        const input = { $case: "text", value: prompt } as const;
        const options = { maxTokens: greedy.length, ignoreEos: true, stop: [], logprobs: 0, noSpeculation: false };
        const call: AsyncIterable<GenerateResponse> = client.generate(
          { model: MODEL, input, options: { ...options, sampling: undefined, seed: undefined } },
          metadata,
        );
        const got: GenerateResponse[] = [];
        for await (const part of call) got.push(part);
        expect(
          { tokens: got.flatMap(({ tokens }) => tokens), text: got.map((part) => part.text).join("") },
          this.door.name,
        ).toEqual({ tokens: greedy, text });
      }
    } finally {
      client.close();
    }
  }
}

const bodyOf = (prompt: string, tokens: number) => ({
  model: MODEL,
  prompt,
  max_tokens: tokens,
  temperature: 0,
  ignore_eos: true,
  muster: { return_token_ids: true },
});
