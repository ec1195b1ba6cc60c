// Speculation with real processes and a real nats-server: whatever happens to drafts and bus, tokens stay the same.
import { spawn } from "node:child_process";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { until } from "../until.ts";
import { type Completion, Muster } from "./muster.ts";

const START = ["builtin://nano-maverick", "--draft", "builtin://nano-draft", "--draft-wait-ms", "50"];
const TOKENS = 48;

const request = (seed: number) => ({
  prompt: ["We must", "The Congress of the United States", "Peace", "Our farmers and"][seed % 4],
  max_tokens: TOKENS,
  temperature: [0, 0.7, 1][seed % 3],
  seed,
  ignore_eos: true,
});
const idsOf = (completion: Completion) =>
  completion.choices[0]?.token_ids ?? completion.choices[0]?.muster?.token_ids ?? [];

describe("speculation over a real nats-server", () => {
  let up: Muster;
  const plain = new Map<number, number[]>();
  const off = { muster: { speculation: false, return_token_ids: true } };

  beforeAll(async () => {
    up = await Muster.up(START);
    for (let seed = 0; seed < 30; seed++) plain.set(seed, idsOf(await up.complete({ ...request(seed), ...off })));
  });
  afterAll(async () => {
    await up?.stop();
  });

  async function check(seeds: number[]): Promise<number> {
    const answers = await Promise.all(seeds.map(async (seed) => ({ seed, answer: await up.complete(request(seed)) })));
    for (const { seed, answer } of answers) expect(idsOf(answer), `seed ${seed}`).toEqual(plain.get(seed));
    return answers.reduce((sum, { answer }) => sum + (answer.usage.muster?.accepted ?? 0), 0);
  }
  const seeds = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i);

  test("10 runs undisturbed: equal tokens, drafts accepted", async () => {
    for (const ids of plain.values()) expect(ids).toHaveLength(TOKENS);
    await until(async () => (await check([0])) > 0, "the draft has been found");
    expect(await check(seeds(0, 10))).toBeGreaterThan(100);
  });

  test("10 runs while the draft is killed and starts again", async () => {
    const first = up.worker(0, "draft");
    const running = check(seeds(10, 20));
    await up.kill9(0, "draft");
    await running;
    await until(() => up.worker(0, "draft") !== first && up.worker(0, "draft") !== undefined, "the draft is back");
    await until(async () => (await check([10])) > 0, "it is of use again");
  });

  test("10 runs while nats-server is killed and starts again", async () => {
    const natsOf = () => up.processes().find(({ command }) => /nats-server/.test(command))?.pid;
    const first = natsOf();
    const running = check(seeds(20, 30));
    if (first !== undefined) process.kill(first, "SIGKILL");
    await running;
    await until(() => natsOf() !== undefined && natsOf() !== first, "nats-server is back");
    await until(async () => (await check([20])) > 0, "drafts are of use again");
  });

  test("with the draft stopped for good (SIGSTOP) answers are the same and come", async () => {
    const pid = up.worker(0, "draft");
    if (pid === undefined) throw new Error("no draft runs");
    const stop = spawn("kill", ["-STOP", String(pid)]);
    await new Promise((done) => stop.on("close", done));
    await check(seeds(0, 3));
    process.kill(pid, "SIGCONT");
  });
});
