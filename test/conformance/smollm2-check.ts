// The comparison of smollm2.mjs. Three chats, greedy, 64 tokens each, end of text ignored, through /v1/chat/completions of
// `muster up`; then the oracles walk along the very ids that were served, so that every position is compared in the same
// context. A position is skipped where our own two best logits are so close that rounding may choose: closer than
// EXACT_GAP against float32, closer than QUANTISED_GAP against llama.cpp, whose activations are rounded to 8 bits.
//   prompt ids     jinja2 renders the GGUF's template, llama.cpp tokenises: the ids that we answered with
//   1 rank         served tokens against the exact oracle, and against llama.cpp
//   logits         `muster eval logits` against the exact oracle, all of the first chat, largest difference
//   2 ranks        refused with exit 3: 9 heads do not divide; the remedy names 3
//   3 ranks        run, and give the tokens of one rank up to the first position that is too close
// Exit 0: all hold.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { Muster } from "../cluster/muster.ts";

const [MODEL = "", VENV = "", LLAMA_CPP = ""] = process.argv.slice(2);
const MAIN = join(import.meta.dirname, "../../controller/cli/main.ts");
const SOURCE = `file://${MODEL}`;
const TOKENS = 64;
const SPEED_TOKENS = 128;
const SPEED_RUNS = 4;
const EXACT_GAP = 1e-3;
/** Twice the largest gap (0.13) at which llama.cpp was seen to choose differently. */
const QUANTISED_GAP = 0.25;
/** Largest difference of a logit, as a share of the largest: 30 blocks of float32 sums in another order. */
const LOGIT_ERROR_MAX = 5e-5;
/** Of all positions; more skips than that would leave little that is compared. */
const EXACT_SKIPS_MAX = 0.02;
const QUANTISED_SKIPS_MAX = 0.2;
/** A close choice ends the comparison of its chat, so one early in a chat skips much. */
const CUT_SKIPS_MAX = 0.5;
const CORES = os.availableParallelism();

type Message = { role: string; content: string };
type Answer = { prompt: number[]; ids: number[]; gaps: number[]; text: string };
/** `closest`: the largest gap at which the other chose differently. */
type Compared = { compared: number; skipped: number; closest: number; wrong: string[] };
type Walk = { ids: number[]; from: number }[];

const chats: Message[][] = [
  [{ role: "user", content: "What is the capital of France, and what is it known for?" }],
  [
    { role: "system", content: "You answer in short, plain sentences." },
    { role: "user", content: "Explain why the sky is blue." },
  ],
  [
    { role: "user", content: "Write a Python function that adds two numbers." },
    { role: "assistant", content: "def add(a, b):\n    return a + b" },
    { role: "user", content: "Now one that multiplies them — mit Ümläuten im Kommentar, bitte." },
  ],
];

/** Runs a command to its end with `input` on its standard input. */
async function say(
  command: string,
  args: string[],
  input = "",
): Promise<{ code: number | null; out: string; err: string }> {
  const child = spawn(command, args, { stdio: ["pipe", "pipe", "pipe"] });
  child.stdin.end(input);
  const [out, err] = await Promise.all([text(child.stdout), text(child.stderr), once(child, "close")]);
  return { code: child.exitCode, out, err };
}

/** The last line of what an oracle prints; libraries print before it. */
async function ask(command: string, args: string[], request: object): Promise<string> {
  const { code, out, err } = await say(command, args, JSON.stringify(request));
  if (code !== 0) throw new Error(`${command} ${args[0]} ended with ${code}:\n${out}${err}`);
  return out.trimEnd().split("\n").at(-1) ?? "";
}

const exactOracle = (request: object) =>
  ask(join(VENV, "bin/python"), [join(import.meta.dirname, "oracle.py"), MODEL], request);
const llamaCpp = (request: object) =>
  ask(process.execPath, [join(import.meta.dirname, "llama-cpp.mjs"), MODEL, LLAMA_CPP, `${CORES}`], request);

async function post(up: Muster, path: string, body: object): Promise<Response> {
  const models: { data: { id: string }[] } = JSON.parse(await (await fetch(`${up.ready.http}/v1/models`)).text());
  const answer = await fetch(`${up.ready.http}${path}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: models.data[0]?.id, temperature: 0, ignore_eos: true, ...body }),
  });
  if (!answer.ok) throw new Error(`HTTP ${answer.status}: ${await answer.text()}`);
  return answer;
}

async function chat(up: Muster, messages: Message[]): Promise<Answer> {
  const options = {
    max_completion_tokens: TOKENS,
    logprobs: true,
    top_logprobs: 2,
    muster: { return_token_ids: true },
  };
  const answer = await post(up, "/v1/chat/completions", { messages, ...options });
  const body: {
    choices: {
      message: { content: string };
      logprobs: { content: { top_logprobs: { logprob: number }[] }[] };
      muster: { prompt_token_ids: number[]; token_ids: number[] };
    }[];
  } = JSON.parse(await answer.text());
  const [choice] = body.choices;
  if (choice === undefined) throw new Error("an answer without a choice");
  // A difference of two log-probabilities of one softmax is the difference of the logits.
  const gaps = choice.logprobs.content.map(
    ({ top_logprobs: [best, next] }) => (best?.logprob ?? 0) - (next?.logprob ?? 0),
  );
  const { prompt_token_ids: prompt, token_ids: ids } = choice.muster;
  if (ids.length !== TOKENS || gaps.length !== TOKENS)
    throw new Error(`${ids.length} ids and ${gaps.length} gaps came`);
  return { prompt, ids, gaps, text: choice.message.content };
}

/** Tokens/s of one stream after its first token. */
async function speedOf(up: Muster): Promise<number> {
  const [messages] = chats;
  const answer = await post(up, "/v1/chat/completions", {
    messages,
    max_completion_tokens: SPEED_TOKENS + 1,
    stream: true,
  });
  const decoder = new TextDecoder();
  let first = 0;
  let last = 0;
  for await (const piece of answer.body ?? []) {
    if (!decoder.decode(piece, { stream: true }).includes('"content":"')) continue;
    last = performance.now();
    first ||= last;
  }
  return (SPEED_TOKENS * 1000) / (last - first);
}

type Served = { answers: Answer[]; speed: number };

/** Serves the model on so many ranks, asks all chats one after the other, and stops. */
async function serve(ranks: number): Promise<Served> {
  const up = await Muster.up([SOURCE, "--ranks", String(ranks)]);
  try {
    const speeds: number[] = [];
    while (speeds.length < SPEED_RUNS) speeds.push(await speedOf(up));
    const answers: Answer[] = [];
    for (const messages of chats) answers.push(await chat(up, messages));
    return { answers, speed: Math.max(...speeds) };
  } finally {
    await up.stop();
  }
}

/** `best`: an oracle's choice after each position of each chat. */
function compare(answers: readonly Answer[], best: readonly (readonly number[])[], gapMin: number): Compared {
  const found: Compared = { compared: 0, skipped: 0, closest: 0, wrong: [] };
  for (const [index, { ids, gaps }] of answers.entries()) {
    for (const [at, id] of ids.entries()) {
      const gap = gaps[at] ?? Number.NaN;
      const isClear = gap >= gapMin;
      found[isClear ? "compared" : "skipped"]++;
      const other = best[index]?.[at];
      if (other === id) continue;
      found.closest = Math.max(found.closest, gap);
      if (isClear)
        found.wrong.push(`chat ${index + 1}, token ${at}: ${id} here, ${other} there, gap ${gap.toFixed(4)}`);
    }
  }
  return found;
}

/** Tokens of another cut: comparable up to the first choice that is too close, because contexts part there. */
function compareStreams(answers: readonly Answer[], others: readonly Answer[]): Compared {
  const found: Compared = { compared: 0, skipped: 0, closest: 0, wrong: [] };
  for (const [index, { ids, gaps }] of answers.entries()) {
    const close = gaps.findIndex((gap) => !(gap >= EXACT_GAP));
    const count = close < 0 ? ids.length : close;
    found.compared += count;
    found.skipped += ids.length - count;
    const at = ids.slice(0, count).findIndex((id, position) => others[index]?.ids[position] !== id);
    if (at >= 0)
      found.wrong.push(`chat ${index + 1}, token ${at}: ${ids[at]} at 1 rank, ${others[index]?.ids[at]} at 3`);
  }
  return found;
}

/** Logits of every position from a process of its own; about 100 MB of text, so it goes through a file. */
async function ownLogits(tokens: readonly number[], file: string): Promise<number[][]> {
  const output = openSync(file, "w");
  const args = [MAIN, "eval", "logits", SOURCE, "--tokens", tokens.join(), "--json"];
  const child = spawn(process.execPath, args, { stdio: ["ignore", output, "inherit"] });
  await once(child, "close");
  closeSync(output);
  if (child.exitCode !== 0) throw new Error(`muster eval logits ended with ${child.exitCode}`);
  return JSON.parse(readFileSync(file, "utf8")).logits;
}

async function logitError({ prompt, ids }: Answer, dump: string): Promise<{ share: number; positions: number }> {
  const tokens = [...prompt, ...ids].slice(0, -1);
  const logits = await ownLogits(tokens, `${dump}.json`);
  const oracle = new Float32Array(new Uint8Array(readFileSync(dump)).buffer);
  const width = logits[0]?.length ?? 0;
  if (logits.length !== tokens.length || oracle.length !== tokens.length * width)
    throw new Error("shapes of logits differ");
  let largest = 0;
  let difference = 0;
  logits.forEach((row, at) => {
    row.forEach((logit, id) => {
      const other = oracle[at * width + id] ?? Number.NaN;
      largest = Math.max(largest, Math.abs(other));
      difference = Math.max(difference, Math.abs(logit - other));
    });
  });
  return { share: difference / largest, positions: logits.length };
}

const lines: { what: string; found: string; holds: boolean }[] = [];
const judge = (what: string, found: string, holds: boolean): void => void lines.push({ what, found, holds });

function judgeCompared(what: string, { compared, skipped, closest, wrong }: Compared, skipsMax: number): void {
  const total = compared + skipped;
  const found = `${compared - wrong.length} of ${compared} positions equal, ${skipped} of ${total} skipped for their gap`;
  const parted = closest > 0 ? `; differs up to a gap of ${closest.toFixed(4)}` : "";
  judge(what, found + parted, wrong.length === 0 && compared > 0 && skipped <= skipsMax * total);
  for (const one of wrong.slice(0, 5)) console.log(`${what}: ${one}`);
}

async function judgePrompts(answers: readonly Answer[]): Promise<void> {
  const texts: string[] = JSON.parse(await exactOracle({ chats }));
  const prompts: number[][] = JSON.parse(await llamaCpp({ texts }));
  const same = answers.filter(({ prompt }, index) => prompt.join() === prompts[index]?.join()).length;
  judge("prompt ids: jinja2 + llama.cpp", `${same} of ${chats.length} chats equal`, same === chats.length);
}

async function judgeExact(answers: readonly Answer[], walk: Walk, folder: string): Promise<void> {
  const dump = join(folder, "logits.f32");
  const exact: { best: number[] }[] = JSON.parse(await exactOracle({ walk, dump }));
  const best = exact.map((one) => one.best);
  judgeCompared("1 rank: exact float32 (transformers)", compare(answers, best, EXACT_GAP), EXACT_SKIPS_MAX);
  const [first] = answers;
  if (first === undefined) throw new Error("no chat was asked");
  const { positions, share } = await logitError(first, dump);
  const found = `${positions} positions x all ids, largest error ${share.toExponential(1)} of the largest logit`;
  judge("logits: exact float32", found, share <= LOGIT_ERROR_MAX);
}

/** Answers with llama.cpp's tokens/s. */
async function judgeLlamaCpp(answers: readonly Answer[], walk: Walk): Promise<number> {
  const asked = { walk, speed: SPEED_TOKENS, runs: SPEED_RUNS };
  const { best, tokensPerSecond }: { best: number[][]; tokensPerSecond: number } = JSON.parse(await llamaCpp(asked));
  const compared = compare(answers, best, QUANTISED_GAP);
  judgeCompared("1 rank: llama.cpp (8-bit activations)", compared, QUANTISED_SKIPS_MAX);
  return tokensPerSecond;
}

async function judgeTwoRanks(): Promise<void> {
  const { code, err } = await say(process.execPath, [MAIN, "up", SOURCE, "--ranks", "2", "--json"]);
  const reasons = err.trim().split("\n").slice(1);
  const isExplained = /9 query heads/.test(err) && /what fits: .*\b3\b/.test(err);
  const found = `exit ${code}: ${reasons.map((line) => line.trim()).join(" ")}`;
  judge("2 ranks: refused, with the nearest", found, code === 3 && isExplained);
}

async function main(): Promise<number> {
  const folder = mkdtempSync(join(os.tmpdir(), "muster-smollm2-"));
  try {
    const load = os.loadavg()[0]?.toFixed(2);
    const one = await serve(1);
    const { answers } = one;
    for (const { text: said } of answers) console.log(`  ${JSON.stringify(said.slice(0, 110))}`);
    const walk: Walk = answers.map(({ prompt, ids }) => ({
      ids: [...prompt, ...ids].slice(0, -1),
      from: prompt.length,
    }));
    await judgePrompts(answers);
    await judgeExact(answers, walk, folder);
    const other = await judgeLlamaCpp(answers, walk);
    await judgeTwoRanks();
    const three = await serve(3);
    judgeCompared("3 ranks: the tokens of 1 rank", compareStreams(answers, three.answers), CUT_SKIPS_MAX);

    const machine = `${os.cpus()[0]?.model.trim()}, ${CORES} cores, load ${load} before the start`;
    console.log(`SmolLM2-135M-Instruct Q4_1 on ${machine}`);
    for (const { what, found, holds } of lines) console.log(`${holds ? "  ok" : "FAIL"}  ${what.padEnd(38)} ${found}`);
    const speeds = [one.speed, three.speed, other].map((speed) => speed.toFixed(1));
    console.log(`      tokens/s of one stream after its first token, best of ${SPEED_RUNS}, ${CORES} threads:`);
    console.log(`      ${speeds[0]} at 1 rank, ${speeds[1]} at 3 ranks, ${speeds[2]} by llama.cpp`);
    return lines.every(({ holds }) => holds) ? 0 : 1;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

process.exitCode = await main();
