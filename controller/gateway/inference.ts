// The gRPC front door: the Inference service with health and reflection. Owns the mapping between its messages and Asks;
// limits and holding are those of streams.ts, as over HTTP.
import type { ServerUnaryCall, ServerWritableStream, ServiceError, sendUnaryData } from "@grpc/grpc-js";
import { Metadata, Server, ServerCredentials, status } from "@grpc/grpc-js";
import { HealthImplementation } from "grpc-health-check";
import { consequence, invalid, waiting } from "../../proto/fault.ts";
import type {
  ChatRequest,
  GenerateOptions,
  GenerateRequest,
  GenerateResponse,
  InferenceServer,
  ModelInfo,
  TokenizeRequest,
  TokenizeResponse,
} from "../../proto/gen/muster/v1/inference.ts";
import { InferenceService } from "../../proto/gen/muster/v1/inference.ts";
import type { Chunk, Fault, Sampling } from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import { greedy } from "../../proto/sampling.ts";
import type { Job, Sink } from "./job.ts";
import { keyCheck } from "./key.ts";
import { BODY_BYTES_MAX, RETRY_AFTER_DOWN_S, RETRY_AFTER_QUEUE_S, STOPS_MAX, TOP_LOGPROBS_MAX } from "./limits.ts";
import { usageOf } from "./openai-answer.ts";
import { addReflection } from "./reflection.ts";
import type { Ask, Choice, Input } from "./requests.ts";
import { seedOfClient } from "./seed.ts";
import type { Streams } from "./streams.ts";
import type { ModelView } from "./watch.ts";

const SERVICE_NAME = "muster.v1.Inference";
/** Messages a client may leave unread before its stalling is timed: one is one step. */
const UNREAD_MESSAGES_MAX = 16_384;

type OutStream<Request> = ServerWritableStream<Request, GenerateResponse>;

export type InferenceOptions = { streams: Streams; apiKey: string | undefined };

/** The faults of the gateway as gRPC errors; the code rides along as metadata. */
function errorOf(fault: Fault): Partial<ServiceError> {
  const { grpc, http, retry } = consequence(fault);
  const metadata = new Metadata();
  metadata.set("muster-code", fault.code);
  if (fault.field !== "") metadata.set("muster-field", fault.field);
  if (retry) metadata.set("retry-after", String(http === 429 ? RETRY_AFTER_QUEUE_S : RETRY_AFTER_DOWN_S));
  return { code: grpc, details: fault.field ? `${fault.field}: ${fault.detail}` : fault.detail, metadata };
}

/** In proto3 an unset number is 0; for top_p and the repetition penalty 0 makes no sense and stands for "off". */
const samplingOf = (given: Sampling | undefined): Sampling =>
  given ? { ...given, topP: given.topP || 1, repetitionPenalty: given.repetitionPenalty || 1 } : greedy;

function samplingFault({ temperature, topP, minP, repetitionPenalty }: Sampling): Fault | undefined {
  if (!(temperature >= 0 && temperature <= 2)) return invalid("options.sampling.temperature", "must be from 0 to 2");
  if (!(topP > 0 && topP <= 1)) return invalid("options.sampling.top_p", "must be in (0, 1]");
  if (!(minP >= 0 && minP <= 1)) return invalid("options.sampling.min_p", "must be from 0 to 1");
  if (!(repetitionPenalty > 0)) return invalid("options.sampling.repetition_penalty", "must be above 0");
  return undefined;
}

function askOf(model: string, input: Input, options: GenerateOptions | undefined): { ask: Ask } | { fault: Fault } {
  const sampling = samplingOf(options?.sampling);
  const stop = options?.stop ?? [];
  const logprobs = options?.logprobs ?? 0;
  const fault = samplingFault(sampling);
  if (fault) return { fault };
  if (stop.length > STOPS_MAX || stop.includes("")) {
    return { fault: invalid("options.stop", `at most ${STOPS_MAX} strings, none of them empty`) };
  }
  if (logprobs > TOP_LOGPROBS_MAX + 1) {
    return { fault: invalid("options.logprobs", `at most ${TOP_LOGPROBS_MAX + 1}: own and ${TOP_LOGPROBS_MAX} best`) };
  }
  const terms = {
    sampling,
    maxTokens: options?.maxTokens ?? 0,
    minTokens: 0,
    stop,
    ignoreEos: options?.ignoreEos ?? false,
    logprobs,
    speculation: !(options?.noSpeculation ?? false),
  };
  const seed = options?.seed === undefined ? undefined : seedOfClient(options.seed);
  return { ask: { model, inputs: [input], n: 1, seed, terms, conversation: "" } };
}

/** One answer on one gRPC stream. */
class CallSink implements Sink {
  job: Job | undefined;
  readonly #call: OutStream<unknown>;
  #stalledSince = 0;
  #saidPrompt = false;

  constructor(call: OutStream<unknown>) {
    this.#call = call;
    call.on("drain", () => {
      this.#stalledSince = 0;
    });
  }

  chunk(choice: Choice, chunk: Chunk): void {
    const isLast = choice.state.kind === "ended";
    const prompt = this.#saidPrompt ? [] : (choice.origin?.prompt ?? []);
    if (prompt.length === 0 && chunk.tokens.length === 0 && chunk.text === "" && !isLast) return;
    this.#saidPrompt = true;
    const written = this.#call.write({
      prompt,
      tokens: chunk.tokens,
      text: chunk.text,
      logprobs: chunk.logprobs,
      finishReason: choice.state.kind === "ended" ? choice.state.reason : "",
      usage: isLast ? usageMessage(choice) : undefined,
    });
    if (!written && this.#stalledSince === 0) this.#stalledSince = performance.now();
  }

  isStalled(now: number, stallMs: number): boolean {
    if (this.#call.writableLength > UNREAD_MESSAGES_MAX) return true;
    return this.#stalledSince > 0 && now - this.#stalledSince >= stallMs;
  }

  flush(): void {}

  waiting(): void {}

  done(): void {
    this.#call.end();
  }

  failed(fault: Fault): void {
    this.#call.emit("error", errorOf(fault));
  }
}

function usageMessage(choice: Choice): NonNullable<GenerateResponse["usage"]> {
  const usage = usageOf([choice], 1);
  const { drafted, accepted, target_steps: targetSteps } = usage.muster;
  return {
    promptTokens: usage.prompt_tokens,
    completionTokens: usage.completion_tokens,
    drafted,
    accepted,
    targetSteps,
  };
}

const infoOf = ({ title, served, downSince }: ModelView): ModelInfo => ({
  name: title,
  revision: served.revision,
  family: served.family,
  contextTokens: served.contextTokens,
  vocabSize: served.vocabSize,
  serving: downSince === undefined,
  numericsId: served.numericsId,
});

export class GrpcFront {
  readonly #server: Server;
  readonly #health: HealthImplementation;
  readonly #streams: Streams;
  readonly #allowed: (authorization: string | undefined) => boolean;
  readonly #sinks = new Set<CallSink>();
  readonly #sweep: NodeJS.Timeout;

  constructor({ streams, apiKey }: InferenceOptions) {
    this.#streams = streams;
    this.#allowed = keyCheck(apiKey);
    this.#server = new Server({ ...channelOptions, "grpc.max_receive_message_length": BODY_BYTES_MAX });
    this.#server.addService(InferenceService, this.#service());
    this.#health = new HealthImplementation({ "": "NOT_SERVING", [SERVICE_NAME]: "NOT_SERVING" });
    this.#health.addToServer(this.#server);
    addReflection(this.#server, [SERVICE_NAME]);
    this.#sweep = setInterval(() => this.#dropStalled(), 1_000);
    this.#sweep.unref();
  }

  /** Binds and returns the port. */
  listen(host: string, port: number): Promise<number> {
    const target = host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
    return new Promise((resolve, reject) => {
      this.#server.bindAsync(target, ServerCredentials.createInsecure(), (error, bound) =>
        error ? reject(error) : resolve(bound),
      );
    });
  }

  setReady(isReady: boolean): void {
    for (const service of ["", SERVICE_NAME]) this.#health.setStatus(service, isReady ? "SERVING" : "NOT_SERVING");
  }

  /** Takes no new call; resolves when the running ones have ended. */
  close(): Promise<void> {
    clearInterval(this.#sweep);
    return new Promise((resolve) => {
      this.#server.tryShutdown(() => resolve());
    });
  }

  forceClose(): void {
    this.#server.forceShutdown();
  }

  #service(): InferenceServer {
    return {
      generate: (call: OutStream<GenerateRequest>) => {
        const { model, input, options } = call.request;
        const missing = { fault: invalid("input", "text or prompt is missing") };
        this.#run(call, input ? askOf(model, input, options) : missing);
      },
      chat: (call: OutStream<ChatRequest>) => {
        const { model, messages, options } = call.request;
        const missing = { fault: invalid("messages", "at least one message is needed") };
        const asked = askOf(model, { $case: "chat", value: { messages } }, options);
        this.#run(call, messages.length > 0 ? asked : missing);
      },
      tokenize: this.#unary((request: TokenizeRequest) => this.#tokenize(request)),
      listModels: this.#unary(async () => ({ models: this.#streams.view.models().map(infoOf) })),
      getModel: this.#unary(async ({ model }: { model: string }) => {
        const found = this.#streams.resolve(model);
        return "fault" in found ? found : infoOf(found.view);
      }),
    };
  }

  #unary<Request, Response extends object>(answer: (request: Request) => Promise<Response | { fault: Fault }>) {
    return (call: ServerUnaryCall<Request, Response>, respond: sendUnaryData<Response>): void => {
      if (!this.#isAllowed(call.metadata)) {
        respond(unauthenticated);
        return;
      }
      answer(call.request).then(
        (result) => ("fault" in result ? respond(errorOf(result.fault)) : respond(null, result)),
        (error: ServiceError) =>
          respond({ code: error.code ?? status.INTERNAL, details: error.details ?? error.message }),
      );
    };
  }

  async #tokenize({ model, input }: TokenizeRequest): Promise<TokenizeResponse | { fault: Fault }> {
    if (!input) return { fault: invalid("input", "text or chat is missing") };
    return this.#streams.tokenize(model, input);
  }

  #run(call: OutStream<unknown>, asked: { ask: Ask } | { fault: Fault }): void {
    const sink = new CallSink(call);
    if (!this.#isAllowed(call.metadata)) {
      call.emit("error", unauthenticated);
      return;
    }
    const started = "fault" in asked ? asked : this.#streams.start(asked.ask, sink);
    if ("fault" in started) {
      sink.failed(started.fault);
      return;
    }
    const { job } = started;
    sink.job = job;
    this.#sinks.add(sink);
    call.on("cancelled", () => this.#streams.cancel(job));
    call.on("close", () => this.#sinks.delete(sink));
  }

  #isAllowed(metadata: Metadata): boolean {
    const [authorization] = metadata.get("authorization");
    return this.#allowed(authorization?.toString());
  }

  #dropStalled(): void {
    const now = performance.now();
    for (const sink of this.#sinks) {
      const { job } = sink;
      if (!job || job.over) this.#sinks.delete(sink);
      else if (sink.isStalled(now, this.#streams.limits.stallMs)) {
        this.#streams.cancel(job);
        sink.failed(waiting("client_stalled", "the client did not read its answer"));
      }
    }
  }
}

const unauthenticated: Partial<ServiceError> = {
  code: status.UNAUTHENTICATED,
  details: "missing or wrong API key: send the metadata 'authorization: Bearer KEY'",
};
