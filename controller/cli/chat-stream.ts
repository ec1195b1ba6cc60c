// One chat answer over HTTP: request, server-sent events, figures. Owns the reading of the stream; prints nothing.
import { z } from "zod";

export type ChatTurn = { role: "system" | "user" | "assistant"; content: string };

export type ChatClient = { url: string; apiKey: string | undefined; signal?: AbortSignal };

export type ChatUsage = { completionTokens: number; drafted: number; accepted: number; targetSteps: number };

export type AnswerFigures = {
  text: string;
  /** Nothing where the answer was stopped before its end. */
  usage: ChatUsage | undefined;
  firstTokenMs: number;
  totalMs: number;
};

const errorSchema = z.object({ error: z.object({ message: z.string() }) });
const modelsSchema = z.object({ data: z.array(z.object({ id: z.string() })) });
const eventSchema = z.object({
  choices: z.array(z.object({ delta: z.object({ content: z.string().nullish() }) })),
  usage: z
    .object({
      completion_tokens: z.number(),
      muster: z.object({ drafted: z.number(), accepted: z.number(), target_steps: z.number() }).optional(),
    })
    .nullish(),
});

/** Names of the models that the gateway knows. */
export async function listModels(client: ChatClient): Promise<string[]> {
  const response = await send(client, "/v1/models");
  return modelsSchema.parse(await response.json()).data.map((model) => model.id);
}

/** Streams one answer; resolves at its end or when the signal stops it, rejects with a message for a person. */
export async function streamChat(
  client: ChatClient,
  body: object,
  onText: (text: string) => void,
): Promise<AnswerFigures> {
  const started = performance.now();
  const figures: AnswerFigures = { text: "", usage: undefined, firstTokenMs: 0, totalMs: 0 };
  try {
    const response = await send(client, "/v1/chat/completions", {
      ...body,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const { choices, usage } = parseEvent(data);
      const text = choices[0]?.delta.content ?? "";
      if (text !== "") {
        if (figures.firstTokenMs === 0) figures.firstTokenMs = performance.now() - started;
        figures.text += text;
        onText(text);
      }
      if (usage) {
        const {
          drafted,
          accepted,
          target_steps: targetSteps,
        } = usage.muster ?? { drafted: 0, accepted: 0, target_steps: 0 };
        figures.usage = { completionTokens: usage.completion_tokens, drafted, accepted, targetSteps };
      }
    }
    if (!figures.usage) throw new Error("the server ended the answer before it was complete");
  } catch (error) {
    if (client.signal?.aborted !== true) throw error;
  }
  figures.totalMs = performance.now() - started;
  return figures;
}

function parseEvent(data: string): z.infer<typeof eventSchema> {
  const value: unknown = JSON.parse(data);
  const failure = errorSchema.safeParse(value);
  if (failure.success) throw new Error(failure.data.error.message);
  return eventSchema.parse(value);
}

async function send(client: ChatClient, path: string, body?: object): Promise<Response> {
  const url = `${client.url.replace(/\/+$/, "")}${path}`;
  const headers: Record<string, string> = { "content-type": "application/json" };
  if (client.apiKey) headers.authorization = `Bearer ${client.apiKey}`;
  let response: Response;
  try {
    response = await fetch(url, {
      headers,
      ...(body ? { method: "POST", body: JSON.stringify(body) } : {}),
      ...(client.signal ? { signal: client.signal } : {}),
    });
  } catch (cause) {
    if (client.signal?.aborted) throw cause;
    throw new Error(`nothing answers at ${client.url}; is 'muster up' running? (--url names another gateway)`, {
      cause,
    });
  }
  if (response.ok) return response;
  const failure = errorSchema.safeParse(await response.json().catch(() => undefined));
  throw new Error(failure.success ? failure.data.error.message : `${url} answered HTTP ${response.status}`);
}

/** The data of each server-sent event; comments are passed over. */
async function* events(response: Response): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let pending = "";
  for await (const bytes of response.body ?? []) {
    pending += decoder.decode(bytes, { stream: true });
    const whole = pending.split("\n\n");
    pending = whole.pop() ?? "";
    for (const event of whole) if (event.startsWith("data: ")) yield event.slice("data: ".length);
  }
}
