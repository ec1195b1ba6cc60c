// A worker dies under load: its group starts again and no stream loses or repeats a token.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { until } from "../until.ts";
import { Muster, START } from "./muster.ts";

const STREAMS = 16;
const TOKENS = 400;

type Told = { text: string; ids: number[]; finish: string | null };

/** One SSE stream, read to its end; `onToken` hears of each piece. */
async function stream(up: Muster, index: number, onToken: () => void): Promise<Told> {
  const answer = await fetch(`${up.ready.http}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model: "nano-maverick",
      prompt: `Number ${index}: my fellow citizens,`,
      max_tokens: TOKENS,
      temperature: index % 2 ? 0.8 : 0,
      seed: 1000 + index,
      stream: true,
      ignore_eos: true,
      frequency_penalty: index % 4 === 3 ? 0.3 : 0,
      muster: { return_token_ids: true, speculation: index % 3 !== 0 },
    }),
  });
  if (!answer.ok || !answer.body) throw new Error(`HTTP ${answer.status}: ${await answer.text()}`);
  const told: Told = { text: "", ids: [], finish: null };
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of answer.body) {
    rest += decoder.decode(bytes, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(`stream ${index}: ${JSON.stringify(event.error)}`);
      const choice = event.choices?.[0];
      if (!choice) continue;
      told.text += choice.text ?? "";
      told.ids.push(...(choice.token_ids ?? choice.muster?.token_ids ?? []));
      told.finish = choice.finish_reason ?? told.finish;
      onToken();
    }
  }
  return told;
}

/** Streams that another leader has taken over so far. */
async function resumes(up: Muster): Promise<number> {
  const metrics = await (await fetch(`${up.ready.http}/metrics`)).text();
  return Number(/^muster_gateway_resumes_total\{[^}]*\} (\d+)/m.exec(metrics)?.[1] ?? 0);
}

describe("kill -9 of a worker under 16 streams", () => {
  let up: Muster;
  let undisturbed: Told[];
  const all = (onToken: () => void) => Promise.all(Array.from({ length: STREAMS }, (_, i) => stream(up, i, onToken)));

  beforeAll(async () => {
    up = await Muster.up(START);
    undisturbed = await all(() => {});
  });
  afterAll(async () => {
    await up?.stop();
  });

  test("undisturbed streams are whole", () => {
    for (const told of undisturbed) {
      expect(told.ids).toHaveLength(TOKENS);
      expect(told.finish).toBe("length");
    }
  });

  test.each([
    ["leader", 0],
    ["follower", 1],
  ])("of the %s: every stream ends with exactly the undisturbed tokens", async (_role, worker) => {
    let pieces = 0;
    const before = up.worker(worker);
    const resumed = await resumes(up);
    const disturbed = all(() => {
      pieces++;
    });
    await until(() => pieces > STREAMS * 6, "all streams are under way");
    await up.kill9(worker);
    const told = await disturbed;
    expect(told).toEqual(undisturbed);
    expect((await resumes(up)) - resumed, "streams cut by the kill and taken over").toBe(STREAMS);
    expect(up.worker(worker)).not.toBe(before);
  });
});
