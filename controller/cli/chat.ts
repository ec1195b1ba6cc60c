// `muster chat`: a streaming conversation over the gateway's own HTTP API. On a terminal a prompt with commands; with a pipe
// one turn per line, answers on stdout and figures on stderr. Owns the conversation; knows of the server what any client does.
import { createInterface, type Interface } from "node:readline";
import { Command, InvalidArgumentError } from "commander";
import pc from "picocolors";
import { type AnswerFigures, type ChatTurn, listModels, streamChat } from "./chat-stream.ts";

type Flags = {
  url: string;
  model?: string;
  system?: string;
  temperature?: number;
  maxTokens?: number;
  seed?: number;
  apiKey?: string;
  speculation: boolean;
};

const HELP = "/reset forgets the conversation, /quit ends it; Ctrl-C stops an answer";

function number(text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value)) throw new InvalidArgumentError("a number is needed.");
  return value;
}

/** The `chat` sub-command. */
export function chatCommand(): Command {
  return new Command("chat")
    .description("Talk to a model. With a pipe: one turn per line, answers on stdout, figures on stderr.")
    .option("--url <url>", "the gateway", "http://127.0.0.1:8080")
    .option("--model <name>", "which model; the first served one by default")
    .option("--system <text>", "a system message in front")
    .option("--temperature <n>", "0 is greedy; the server's default is 1", number)
    .option("--max-tokens <n>", "longest answer; up to the context by default", number)
    .option("--seed <n>", "the same seed gives the same answer", number)
    .option("--api-key <key>", "of the gateway (or MUSTER_API_KEY)")
    .option("--no-speculation", "without draft tokens")
    .action((flags: Flags) => chat(flags));
}

class Conversation {
  readonly #flags: Flags;
  readonly #model: string;
  #messages: ChatTurn[] = [];

  constructor(flags: Flags, model: string) {
    this.#flags = flags;
    this.#model = model;
    this.reset();
  }

  reset(): void {
    const { system } = this.#flags;
    this.#messages = system === undefined ? [] : [{ role: "system", content: system }];
  }

  /** One turn; a failed one leaves the conversation as it was, a stopped one keeps what was said. */
  async say(content: string, signal: AbortSignal): Promise<AnswerFigures> {
    const { url, apiKey, temperature, maxTokens, seed, speculation } = this.#flags;
    const messages: ChatTurn[] = [...this.#messages, { role: "user", content }];
    const figures = await streamChat(
      { url, apiKey: apiKey ?? process.env.MUSTER_API_KEY, signal },
      {
        model: this.#model,
        messages,
        ...(temperature === undefined ? {} : { temperature }),
        ...(maxTokens === undefined ? {} : { max_tokens: maxTokens }),
        ...(seed === undefined ? {} : { seed }),
        muster: { speculation },
      },
      (text) => process.stdout.write(text),
    );
    this.#messages = [...messages, { role: "assistant", content: figures.text }];
    return figures;
  }
}

/** Tokens, speed, and how many drafted tokens were accepted, in one line. */
function describeFigures(figures: AnswerFigures): string {
  const { usage, firstTokenMs, totalMs } = figures;
  if (!usage) return "stopped";
  // Over the whole turn: a client that reads late sees the last tokens in one burst, and a rate between arrivals would lie.
  const rate = (usage.completionTokens * 1000) / totalMs;
  const drafts =
    usage.drafted > 0
      ? `, drafts ${usage.accepted}/${usage.drafted} accepted in ${usage.targetSteps} steps`
      : ", no drafts";
  return `${usage.completionTokens} tokens, ${rate.toFixed(1)} tok/s, first after ${firstTokenMs.toFixed(0)} ms${drafts}`;
}

async function chat(flags: Flags): Promise<void> {
  const client = { url: flags.url, apiKey: flags.apiKey ?? process.env.MUSTER_API_KEY };
  let model: string;
  try {
    model = flags.model ?? (await firstModel(client));
  } catch (error) {
    return fail(error);
  }
  const conversation = new Conversation(flags, model);
  const isTerminal = process.stdin.isTTY === true;
  const lines = createInterface({ input: process.stdin, ...(isTerminal ? { output: process.stdout } : {}) });
  if (isTerminal) process.stdout.write(pc.dim(`${model} at ${flags.url}; ${HELP}\n`));
  await converse(conversation, lines, isTerminal);
}

async function firstModel(client: { url: string; apiKey: string | undefined }): Promise<string> {
  const [model] = await listModels(client);
  if (model === undefined) throw new Error(`no model is served at ${client.url}`);
  return model;
}

async function converse(conversation: Conversation, lines: Interface, isTerminal: boolean): Promise<void> {
  let answering: AbortController | undefined;
  const stop = () => {
    if (answering) answering.abort();
    else lines.close();
  };
  // A terminal's Ctrl-C reaches readline, a pipe's the process.
  if (isTerminal) lines.on("SIGINT", stop);
  else process.on("SIGINT", stop);
  const prompt = () => isTerminal && lines.prompt();
  prompt();
  for await (const line of lines) {
    const said = line.trim();
    if (said === "/quit" || said === "/exit") break;
    if (said === "/reset") conversation.reset();
    else if (said === "/help") process.stderr.write(`${HELP}\n`);
    else if (said !== "") {
      answering = new AbortController();
      await turn(conversation, said, { signal: answering.signal, isTerminal });
      answering = undefined;
      if (!isTerminal && process.exitCode) break;
    }
    prompt();
  }
  lines.close();
  process.off("SIGINT", stop);
}

async function turn(
  conversation: Conversation,
  said: string,
  { signal, isTerminal }: { signal: AbortSignal; isTerminal: boolean },
): Promise<void> {
  try {
    const figures = await conversation.say(said, signal);
    process.stdout.write("\n");
    process.stderr.write(`${isTerminal ? pc.dim(describeFigures(figures)) : describeFigures(figures)}\n`);
  } catch (error) {
    if (isTerminal) process.stderr.write(`${pc.red(messageOf(error))}\n`);
    else fail(error);
  }
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

function fail(error: unknown): void {
  process.stderr.write(`muster chat: ${messageOf(error)}\n`);
  process.exitCode = 1;
}
