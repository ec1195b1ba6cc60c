// What a client may send to the OpenAI routes: parsed once into an Ask, refused by the name of the field. Owns the schemas
// and the defaults of both APIs; what is not built is refused by name, never ignored.
import { z } from "zod";
import { invalid } from "../../proto/fault.ts";
import type { Fault, Message } from "../../proto/gen/muster/v1/worker.ts";
import {
  CHOICES_MAX,
  LOGIT_BIAS_MAX,
  MESSAGES_MAX,
  N_MAX,
  STOP_UNITS_MAX,
  STOPS_MAX,
  TOP_LOGPROBS_MAX,
} from "./limits.ts";
import type { Ask, Input } from "./requests.ts";
import { seedOfClient } from "./seed.ts";

/** How the answer is to look. */
export type Presentation = {
  api: "chat" | "completions";
  stream: boolean;
  includeUsage: boolean;
  logprobs: boolean;
  returnTokenIds: boolean;
};

export type Parsed = { ask: Ask; presentation: Presentation };

const COMPLETION_MAX_TOKENS = 16;

/** Known to clients of the API, not built here: refused by name unless null. */
const unsupported = new Set([
  "audio",
  "best_of",
  "function_call",
  "functions",
  "grammar",
  "guided_choice",
  "guided_grammar",
  "guided_json",
  "guided_regex",
  "metadata",
  "modalities",
  "parallel_tool_calls",
  "prediction",
  "prompt_logprobs",
  "reasoning_effort",
  "service_tier",
  "store",
  "structured_outputs",
  "suffix",
  "tool_choice",
  "tools",
  "verbosity",
  "web_search_options",
]);

const penalty = z.number().min(-2).max(2).default(0);
const count = (max: number) => z.int().min(0).max(max);
const stopString = z.string().min(1).max(STOP_UNITS_MAX);

const common = {
  model: z.string().min(1).max(256),
  stream: z.boolean().default(false),
  stream_options: z.strictObject({ include_usage: z.boolean().default(false) }).optional(),
  max_tokens: z.int().min(1).max(0xffffffff).optional(),
  n: z.int().min(1).max(N_MAX).default(1),
  seed: z.int().optional(),
  stop: z
    .union([stopString, z.array(stopString).max(STOPS_MAX)], {
      error: `must be a string or an array of at most ${STOPS_MAX} strings, each of 1 to ${STOP_UNITS_MAX} characters`,
    })
    .default([]),
  temperature: z.number().min(0).max(2).default(1),
  top_p: z.number().gt(0).max(1).default(1),
  top_k: z.int().min(-1).max(0x7fffffff).default(0),
  min_p: z.number().min(0).max(1).default(0),
  presence_penalty: penalty,
  frequency_penalty: penalty,
  repetition_penalty: z.number().min(0.01).max(100).default(1),
  logit_bias: z.record(z.string().regex(/^\d{1,9}$/), z.number().min(-100).max(100)).default({}),
  min_tokens: count(0xffffffff).default(0),
  ignore_eos: z.boolean().default(false),
  // Labels for the provider's own use: whoever has the same keeps his replica where he can; nothing else changes.
  user: z.string().max(1024).optional(),
  safety_identifier: z.string().max(1024).optional(),
  prompt_cache_key: z.string().max(1024).optional(),
  response_format: z
    .strictObject({ type: z.literal("text") }, { error: 'only {"type": "text"} is supported' })
    .optional(),
  muster: z
    .strictObject({ speculation: z.boolean().default(true), return_token_ids: z.boolean().default(false) })
    .default({ speculation: true, return_token_ids: false }),
};

const completionSchema = z.strictObject({
  ...common,
  prompt: z.unknown(),
  echo: z.literal(false, { error: "echo is not supported" }).optional(),
  logprobs: count(TOP_LOGPROBS_MAX).optional(),
});

const textPart = z.strictObject({ type: z.literal("text"), text: z.string() });
const messageSchema = z.strictObject({
  role: z.enum(["system", "developer", "user", "assistant"]),
  content: z.unknown(),
  name: z.string().max(256).optional(),
});

const chatSchema = z.strictObject({
  ...common,
  messages: z.array(z.unknown()).min(1).max(MESSAGES_MAX),
  max_completion_tokens: z.int().min(1).max(0xffffffff).optional(),
  logprobs: z.boolean().default(false),
  top_logprobs: count(TOP_LOGPROBS_MAX).optional(),
});

type Common = z.infer<typeof completionSchema> | z.infer<typeof chatSchema>;

/** A refusal on its way out of nested parsing. */
class Refusal extends Error {
  readonly fault: Fault;
  constructor(fault: Fault) {
    super(fault.detail);
    this.fault = fault;
  }
}

const refuse = (field: string, detail: string, code?: string): never => {
  throw new Refusal(invalid(field, detail, code));
};

function parsing(parse: () => Parsed): Parsed | { fault: Fault } {
  try {
    return parse();
  } catch (error) {
    if (error instanceof Refusal) return { fault: error.fault };
    throw error;
  }
}

/** The path of a zod issue as clients write it: messages[0].content. */
function fieldOf(prefix: string, path: readonly PropertyKey[]): string {
  let field = prefix;
  for (const key of path) {
    if (typeof key === "number") field += `[${key}]`;
    else field += field ? `.${String(key)}` : String(key);
  }
  return field;
}

function check<T>(schema: z.ZodType<T>, value: unknown, prefix = ""): T {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  if (issue?.code === "unrecognized_keys") {
    const field = fieldOf(prefix, [...issue.path, issue.keys[0] ?? ""]);
    return refuse(field, `unknown field ${field}`, "unknown_field");
  }
  const field = fieldOf(prefix, issue?.path ?? []);
  if (issue?.code === "invalid_type" && issue.message.endsWith("received undefined")) {
    return refuse(field, `${field} is missing`, "missing_field");
  }
  return refuse(field, `${field || "the body"}: ${issue?.message ?? "invalid"}`);
}

/** The body's own fields; null stands for absent, as in OpenAI's API. */
function fieldsOf(body: unknown): Record<string, unknown> {
  if (typeof body !== "object" || body === null || Array.isArray(body)) {
    return refuse("", "the body must be a JSON object");
  }
  const given = Object.entries(body).filter(([, value]) => value !== null);
  for (const [key] of given) if (unsupported.has(key)) refuse(key, `${key} is not supported`, "unsupported_parameter");
  // Own properties even for a key such as __proto__, which is then an unknown field.
  return Object.fromEntries(given);
}

export const parseCompletion = (body: unknown): Parsed | { fault: Fault } =>
  parsing(() => {
    const fields = check(completionSchema, fieldsOf(body));
    const { logprobs } = fields;
    const ask = askOf(fields, promptsOf(fields.prompt), {
      maxTokens: fields.max_tokens ?? COMPLETION_MAX_TOKENS,
      logprobs: logprobs === undefined ? 0 : logprobs + 1,
    });
    return { ask, presentation: presentationOf("completions", fields, logprobs !== undefined) };
  });

export const parseChat = (body: unknown): Parsed | { fault: Fault } =>
  parsing(() => {
    const fields = check(chatSchema, fieldsOf(body));
    const { logprobs, top_logprobs: top } = fields;
    if (top !== undefined && !logprobs) refuse("top_logprobs", "top_logprobs needs logprobs: true");
    const messages = fields.messages.map(messageOf);
    const ask = askOf(fields, [{ $case: "chat", value: { messages } }], {
      maxTokens: fields.max_completion_tokens ?? fields.max_tokens ?? 0,
      logprobs: logprobs ? (top ?? 0) + 1 : 0,
    });
    return { ask, presentation: presentationOf("chat", fields, logprobs) };
  });

function presentationOf(api: Presentation["api"], fields: Common, logprobs: boolean): Presentation {
  const { stream, stream_options: options } = fields;
  if (options && !stream) refuse("stream_options", "stream_options needs stream: true");
  const includeUsage = options?.include_usage ?? false;
  return { api, stream, includeUsage, logprobs, returnTokenIds: fields.muster.return_token_ids };
}

function askOf(fields: Common, inputs: Input[], own: { maxTokens: number; logprobs: number }): Ask {
  if (inputs.length * fields.n > CHOICES_MAX) {
    refuse("n", `prompts times n is ${inputs.length * fields.n}; at most ${CHOICES_MAX} choices in one request`);
  }
  if (own.maxTokens > 0 && fields.min_tokens > own.maxTokens) {
    refuse("min_tokens", `min_tokens ${fields.min_tokens} is more than max_tokens ${own.maxTokens}`);
  }
  const biases = Object.entries(fields.logit_bias);
  if (biases.length > LOGIT_BIAS_MAX) refuse("logit_bias", `at most ${LOGIT_BIAS_MAX} entries`);
  return {
    model: fields.model,
    inputs,
    n: fields.n,
    conversation: fields.prompt_cache_key ?? fields.user ?? "",
    seed: fields.seed === undefined ? undefined : seedOfClient(fields.seed),
    terms: {
      sampling: {
        temperature: fields.temperature,
        topK: Math.max(0, fields.top_k),
        topP: fields.top_p,
        minP: fields.min_p,
        repetitionPenalty: fields.repetition_penalty,
        presencePenalty: fields.presence_penalty,
        frequencyPenalty: fields.frequency_penalty,
        logitBias: biases.map(([id, bias]) => ({ id: Number(id), bias })),
      },
      maxTokens: own.maxTokens,
      minTokens: fields.min_tokens,
      stop: typeof fields.stop === "string" ? [fields.stop] : fields.stop,
      ignoreEos: fields.ignore_eos,
      logprobs: own.logprobs,
      speculation: fields.muster.speculation,
    },
  };
}

function messageOf(value: unknown, index: number): Message {
  const at = `messages[${index}]`;
  if (typeof value !== "object" || value === null || Array.isArray(value)) return refuse(at, `${at} must be an object`);
  const own: Record<string, unknown> = Object.fromEntries(Object.entries(value).filter(([, item]) => item !== null));
  for (const key of ["tool_calls", "tool_call_id", "function_call", "audio"]) {
    if (key in own) refuse(`${at}.${key}`, `${at}.${key} is not supported`, "unsupported_parameter");
  }
  if (own.role === "tool" || own.role === "function") {
    refuse(`${at}.role`, `${at}.role ${JSON.stringify(own.role)} is not supported`, "unsupported_value");
  }
  const message = check(messageSchema, own, at);
  // Templates know `system`; `developer` is the same role by its later name.
  const role = message.role === "developer" ? "system" : message.role;
  return { role, content: contentOf(message.content, `${at}.content`), name: message.name ?? "" };
}

function contentOf(content: unknown, at: string): string {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return refuse(at, `${at} must be a string or an array of {"type": "text"} parts`);
  let text = "";
  for (const [index, part] of content.entries()) {
    const type: unknown = typeof part === "object" && part !== null && "type" in part ? part.type : undefined;
    if (typeof type === "string" && type !== "text") {
      refuse(
        `${at}[${index}].type`,
        `${at}[${index}]: content of type ${JSON.stringify(type)} is not supported`,
        "unsupported_value",
      );
    }
    text += check(textPart, part, `${at}[${index}]`).text;
  }
  return text;
}

const isIds = (value: unknown[]): value is number[] =>
  value.every((id) => typeof id === "number" && Number.isInteger(id) && id >= 0 && id <= 0x7fffffff);

function promptsOf(prompt: unknown): Input[] {
  if (typeof prompt === "string") return [{ $case: "text", value: prompt }];
  if (!Array.isArray(prompt) || prompt.length === 0) {
    return refuse("prompt", "prompt must be a string, an array of strings, of token ids, or of arrays of token ids");
  }
  if (typeof prompt[0] === "number") return [idsOf(prompt, "prompt")];
  if (prompt.length > CHOICES_MAX) refuse("prompt", `${prompt.length} prompts; at most ${CHOICES_MAX}`);
  return prompt.map((one: unknown, index): Input => {
    const at = `prompt[${index}]`;
    if (typeof one === "string" && typeof prompt[0] === "string") return { $case: "text", value: one };
    if (Array.isArray(one) && Array.isArray(prompt[0])) return idsOf(one, at);
    return refuse(at, `${at} must be ${Array.isArray(prompt[0]) ? "an array of token ids" : "a string"}`);
  });
}

function idsOf(ids: unknown[], at: string): Input {
  if (ids.length === 0) return refuse(at, `${at} has no token ids`);
  if (!isIds(ids)) return refuse(at, `${at} must hold token ids, integers from 0`);
  return { $case: "prompt", value: { ids } };
}
