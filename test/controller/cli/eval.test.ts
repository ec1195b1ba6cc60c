// `muster eval` against the golden logits of another implementation, as a user would compare them.
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { muster } from "./run.ts";

const GOLDEN = join(import.meta.dirname, "../../golden");
const TOLERANCE = 2e-5; // of the largest |logit|

type Golden = { tokens: number[]; logits: number[][]; max_abs_logit: number };
const golden = (family: string): Golden => JSON.parse(readFileSync(join(GOLDEN, family, "golden.json"), "utf8"));

describe("muster eval logits", () => {
  test.each([
    ["llama", []],
    ["llama-tied", ["--backend", "ref"]],
    ["llama4-maverick", ["--ranks", "2", "--ep", "2"]],
    ["llama4-scout", ["--ranks", "4", "--ep", "2", "--etp", "2"]],
  ])("%s %j: one row for each token, within tolerance of the golden logits", async (family, options) => {
    const { tokens, logits, max_abs_logit } = golden(family);
    const { code, out, err } = await muster(
      "eval",
      "logits",
      `file://${join(GOLDEN, family)}`,
      "--tokens",
      tokens.join(","),
      "--json",
      ...options,
    );
    expect(err).toBe("");
    expect(code).toBe(0);
    const said: { tokens: number[]; logits: number[][] } = JSON.parse(out);
    expect(said.tokens).toEqual(tokens);
    expect(said.logits).toHaveLength(tokens.length);
    let worst = 0;
    for (const [position, row] of logits.entries()) {
      expect(said.logits[position]).toHaveLength(row.length);
      for (const [id, logit] of row.entries()) {
        worst = Math.max(worst, Math.abs(logit - (said.logits[position]?.[id] ?? Number.NaN)));
      }
    }
    expect(worst / max_abs_logit).toBeLessThanOrEqual(TOLERANCE);
  });

  test("output larger than a pipe arrives whole", async () => {
    const tokens = Array.from({ length: 60 }, (_, i) => i);
    const { code, out } = await muster(
      "eval",
      "logits",
      "builtin://nano-draft",
      "--tokens",
      tokens.join(","),
      "--json",
    );
    expect(code).toBe(0);
    expect(out.length).toBeGreaterThan(1_000_000);
    const said: { logits: number[][] } = JSON.parse(out);
    expect(said.logits).toHaveLength(60);
  });

  test("token ids outside the vocabulary, no ids, and an unknown source are said by name", async () => {
    const source = `file://${join(GOLDEN, "llama")}`;
    const outside = await muster("eval", "logits", source, "--tokens", "1,2,97000");
    expect(outside.code).toBe(1);
    expect(outside.err).toMatch(/97000|vocab/);
    expect((await muster("eval", "logits", source, "--tokens", "x")).code).toBe(2);
    expect((await muster("eval", "logits", source)).code).toBe(2);
    const unknown = await muster("eval", "logits", "ftp://somewhere", "--tokens", "1");
    expect(unknown.code).toBe(2);
    expect(unknown.err).toContain("ftp");
  });
});

describe("muster eval perplexity", () => {
  test("the quantised file is close to the original, and both know their own kind of text", async () => {
    const text = join(mkdtempSync(join(tmpdir(), "text-")), "speech.txt");
    const speech =
      "Mr. Speaker, Mr. Vice President, Members of Congress, distinguished guests, and fellow citizens: " +
      "The state of the Union is strong. We have made progress in the past year, and the Congress and the " +
      "American people can be proud of what we have done together. But there is much more that we must do. ";
    writeFileSync(text, speech.repeat(4));
    const of = async (source: string) => {
      const { code, out } = await muster("eval", "perplexity", source, "--text", text, "--json");
      expect(code).toBe(0);
      const said: { tokens: number; nll: number; perplexity: number } = JSON.parse(out);
      return said;
    };
    const [plain, quantised] = [await of("builtin://nano-maverick"), await of("builtin://nano-maverick-q4_k_m")];
    expect(plain.tokens).toBeGreaterThan(200);
    expect(plain.tokens).toBe(quantised.tokens);
    expect(plain.perplexity).toBeLessThan(25); // it has been trained on such text; a wrong forward gives thousands
    expect(Math.abs(plain.nll - quantised.nll)).toBeLessThan(0.05);
  });
});
