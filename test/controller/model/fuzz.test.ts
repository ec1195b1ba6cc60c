// Valid files with bytes changed at random: the answer is a ModelSpec or a FaultError, never another exception. A failure
// prints fast-check's seed and the shrunk case.
import { readFileSync } from "node:fs";
import fc from "fast-check";
import { expect, test } from "vitest";
import { memorySource } from "../../../controller/model/byte-source.ts";
import { readGguf } from "../../../controller/model/gguf.ts";
import { parseJson } from "../../../controller/model/json.ts";
import { readModel } from "../../../controller/model/model.ts";
import { readSafetensors } from "../../../controller/model/safetensors.ts";
import { FaultError } from "../../../proto/fault.ts";
import {
  array,
  cacheDir,
  folder,
  type GgufValue,
  gguf,
  ggufString,
  safetensors,
  text,
  tinyConfig,
  tinyHeader,
  tinyKeys,
  tinyTensors,
  u32,
} from "./craft.ts";

const SEED = 20_260_101;
const { header, bytes } = tinyHeader();
const weights = safetensors(header, bytes);
const config = Buffer.from(JSON.stringify(tinyConfig));
const tokenizerKeys: [string, GgufValue][] = [
  ["tokenizer.ggml.model", text("llama")],
  ["tokenizer.ggml.tokens", array(8, ["<unk>", "<s>", "a", "b", "ab"].map(ggufString))],
  [
    "tokenizer.ggml.scores",
    array(
      6,
      [0, 0, 1, 1, 1].map((n) => u32(n).bytes),
    ),
  ],
  [
    "tokenizer.ggml.token_type",
    array(
      4,
      [2, 3, 1, 1, 1].map((n) => u32(n).bytes),
    ),
  ],
  ["tokenizer.ggml.bos_token_id", u32(1)],
];
const small = gguf({ keys: [...tinyKeys, ...tokenizerKeys], tensors: tinyTensors });

type Flip = { at: number; value: number };
const flips = (length: number) =>
  fc.array(fc.record({ at: fc.nat({ max: length - 1 }), value: fc.nat({ max: 255 }) }), { minLength: 1, maxLength: 6 });

function flipped(original: Uint8Array, changes: readonly Flip[]): Buffer {
  const copy = Buffer.from(original);
  for (const { at, value } of changes) copy[at] = value;
  return copy;
}

/** Runs what must end with a value or a FaultError, and tells which. */
async function outcome(run: () => unknown): Promise<"value" | "fault"> {
  try {
    await run();
    return "value";
  } catch (error) {
    if (error instanceof FaultError) return "fault";
    throw error;
  }
}

async function check(length: number, run: (changes: Flip[]) => unknown, runs: number): Promise<void> {
  const seen = { value: 0, fault: 0 };
  await fc.assert(
    fc.asyncProperty(flips(length), async (changes) => {
      seen[await outcome(() => run(changes))]++;
    }),
    { seed: SEED, numRuns: runs },
  );
  // Both happen, or the property would say nothing.
  expect(seen.fault).toBeGreaterThan(0);
  expect(seen.value + seen.fault).toBeGreaterThanOrEqual(runs);
}

test("GGUF files with flipped bytes", async () => {
  await check(
    small.length - 3000,
    (changes) => readModel(`file://${folder({ "x.gguf": flipped(small, changes) })}/x.gguf`, { cacheDir }),
    600,
  );
}, 120_000);

test("safetensors headers with flipped bytes", async () => {
  await check(
    weights.length - bytes,
    (changes) =>
      readModel(`file://${folder({ "config.json": config, "model.safetensors": flipped(weights, changes) })}`, {
        cacheDir,
      }),
    600,
  );
}, 120_000);

test("config.json with flipped bytes", async () => {
  await check(
    config.length,
    (changes) =>
      readModel(`file://${folder({ "config.json": flipped(config, changes), "model.safetensors": weights })}`, {
        cacheDir,
      }),
    600,
  );
}, 120_000);

test("the headers of the built-in models with flipped bytes", async () => {
  const q8 = readFileSync("test/models/nano-draft/nano-draft-Q8_0.gguf");
  const bf16 = readFileSync("test/models/nano-draft/model.safetensors");
  await check(90_000, (changes) => readGguf(memorySource("x.gguf", flipped(q8, changes))), 150);
  await check(2_400, (changes) => readSafetensors(memorySource("x.safetensors", flipped(bf16, changes)), 0), 300);
}, 120_000);

test("the JSON parser takes what JSON.parse takes, and only that", () => {
  fc.assert(
    fc.property(fc.json({ maxDepth: 8 }), (text) => {
      expect(toPlain(parseJson(Buffer.from(text), "x.json"))).toEqual(JSON.parse(text));
    }),
    { seed: SEED, numRuns: 1000 },
  );
  fc.assert(
    fc.property(fc.string({ unit: fc.constantFrom(...'{}[]",:0123456789.eE+-truefalsn \\u') }), (text) => {
      let valid = true;
      try {
        JSON.parse(text);
      } catch {
        valid = false;
      }
      let ours = true;
      try {
        parseJson(Buffer.from(text), "x.json");
      } catch (error) {
        if (!(error instanceof FaultError)) throw error;
        ours = false;
        // Stricter on purpose: keys that appear twice, numbers that are not finite.
        if (/appears twice|is not a value/.test(error.message)) return;
      }
      expect(ours).toBe(valid);
    }),
    { seed: SEED, numRuns: 20_000 },
  );
});

function toPlain(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(toPlain);
  if (typeof value !== "object" || value === null || !("entries" in value) || !(value.entries instanceof Map))
    return value;
  const plain: Record<string, unknown> = {};
  for (const [key, entry] of value.entries)
    Object.defineProperty(plain, key, {
      value: toPlain(entry.value),
      enumerable: true,
      configurable: true,
      writable: true,
    });
  return plain;
}
