// Question: what do drafts from another process bring one stream, in tokens per target step and in tokens per second?
// Method: `muster up` with nano-maverick on one rank and nano-draft in a process of its own, real nats-server, 4 tokens drafted,
//   50 ms wait; 32 prompts x 96 tokens, one stream at a time, end of text ignored, with and without speculation in turn; at
//   temperatures 0, 0.7 and 1.0. Tokens per target step = completion tokens / steps after prefill. The clock starts once the draft's guesses arrive, and two prompts later.
// Checked in the same run: token ids with and without speculation are equal.
// Machine: printed, and a column of each row. Three processes share its cores, so time is no measure of a draft pod of its own.
// Not measured: several streams, other models, a network between the pods.
// Appends a row for each temperature to test/bench/results/speculation.csv. Exit 1: ids differ.
//
//   npm run bench -- speculation
import { readFileSync } from "node:fs";
import os from "node:os";
import { join } from "node:path";
import { Muster } from "../cluster/muster.ts";
import { until } from "../until.ts";
import { appendRow, commit, median } from "./row.ts";

const TOKENS = 96;
const TEMPERATURES = [0, 0.7, 1];
const WARM_PROMPTS = 2;
const RESULTS = join(import.meta.dirname, "results/speculation.csv");
const HEADER =
  "date,commit,cpu,cores,load_before,temperature,prompts,tokens_per_target_step,accepted_share,tokens_per_s_with,tokens_per_s_without,ratio";

const prompts: string[] = JSON.parse(
  readFileSync(join(import.meta.dirname, "../fixtures/prompts.json"), "utf8"),
).prompts;

type Answer = { ids: string; ms: number; drafted: number; accepted: number; steps: number };

async function ask(up: Muster, prompt: string, temperature: number, speculation: boolean): Promise<Answer> {
  const began = performance.now();
  const muster = { speculation, return_token_ids: true };
  const said = await up.complete({ prompt, temperature, max_tokens: TOKENS, seed: 11, ignore_eos: true, muster });
  const ms = performance.now() - began;
  const [choice] = said.choices;
  const { drafted, accepted, target_steps: steps } = said.usage.muster ?? { drafted: 0, accepted: 0, target_steps: 0 };
  return { ids: (choice?.token_ids ?? choice?.muster?.token_ids ?? []).join(), ms, drafted, accepted, steps };
}

async function main(): Promise<number> {
  const load = (os.loadavg()[0] ?? 0).toFixed(2);
  const cpu = os.cpus()[0]?.model.trim() ?? "unknown";
  const cores = os.availableParallelism();
  const up = await Muster.up(["builtin://nano-maverick", "--draft", "builtin://nano-draft", "--draft-wait-ms", "50"]);
  let isSame = true;
  try {
    await until(async () => (await ask(up, prompts[0] ?? "", 0, true)).accepted > 0, "the draft is of use");
    console.log(`${prompts.length} prompts x ${TOKENS} tokens, one stream; ${cpu}, ${cores} cores, load ${load}`);
    for (const temperature of TEMPERATURES) {
      const pairs: { on: Answer; off: Answer }[] = [];
      for (const prompt of [...prompts.slice(0, WARM_PROMPTS), ...prompts]) {
        const on = await ask(up, prompt, temperature, true);
        pairs.push({ on, off: await ask(up, prompt, temperature, false) });
      }
      isSame &&= pairs.every(({ on, off }) => on.ids === off.ids && on.ids !== "");
      const timed = pairs.slice(WARM_PROMPTS);
      const sum = (value: (answer: Answer) => number) => timed.reduce((total, { on }) => total + value(on), 0);
      const perStep = (timed.length * TOKENS) / sum((on) => on.steps);
      const share = sum((on) => on.accepted) / sum((on) => on.drafted);
      const [withMs, withoutMs] = [median(timed.map(({ on }) => on.ms)), median(timed.map(({ off }) => off.ms))];
      const speed = [withMs, withoutMs].map((ms) => ((TOKENS * 1000) / ms).toFixed(0));
      const ratio = (withoutMs / withMs).toFixed(2);
      console.log(
        `temperature ${temperature}: ${perStep.toFixed(2)} tokens a step, ${(share * 100).toFixed(0)} % of drafts accepted, ${speed[0]} tokens/s with, ${speed[1]} without, ratio ${ratio}`,
      );
      const figures = [temperature, timed.length, perStep.toFixed(3), share.toFixed(3), ...speed, ratio];
      if (isSame) appendRow(RESULTS, HEADER, [new Date().toISOString(), commit(), cpu, cores, load, ...figures]);
    }
  } finally {
    await up.stop();
  }
  console.log(`token ids with and without speculation ${isSame ? "are equal" : "DIFFER"}`);
  return isSame ? 0 : 1;
}

process.exitCode = await main();
