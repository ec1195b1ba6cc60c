// Sources that others have read: the model is the same as where it was read, and nothing else can be read from it.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { openSource } from "../../../controller/model/sources/open.ts";
import { parsePvc } from "../../../controller/model/sources/pvc.ts";
import { type Recording, recordedSource, recorder } from "../../../controller/model/sources/recorded.ts";
import { FaultError } from "../../../proto/fault.ts";
import { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";

const cacheDir = mkdtempSync(join(tmpdir(), "muster-recorded-"));
afterAll(() => rmSync(cacheDir, { recursive: true, force: true }));
const HEADERS = { cacheDir, headersOnly: true, tokenizer: true };

async function record(source: string): Promise<{ direct: ModelSpec; recording: Recording }> {
  const { place, recording } = recorder(await openSource(source, { cacheDir }));
  const direct = await readModel(source, { ...HEADERS, place });
  return { direct, recording: structuredClone(recording) };
}

describe.each([
  "builtin://nano-maverick",
  "builtin://nano-maverick-q4_k_m",
  "file://./test/golden/llama4-scout",
  "file://./test/models/nano-draft/nano-draft-Q8_0.gguf",
])("%s", (source) => {
  test("C1: read from its recording it is the same model", async () => {
    const { direct, recording } = await record(source);
    const replayed = await readModel(source, { ...HEADERS, place: recordedSource(recording) });
    expect(ModelSpec.toJSON(replayed)).toEqual(ModelSpec.toJSON(direct));
    const own = await readModel(source, HEADERS);
    expect(replayed.digest).toBe(own.digest);
    expect(replayed.tensors).toEqual(own.tensors);
    expect(replayed.tokenizer?.vocabHash).toBe(own.tokenizer?.vocabHash);
    expect(replayed.files.map(({ path }) => path)).toEqual(own.files.map(() => ""));
  });

  test("C2: headers alone are recorded, each byte once", async () => {
    const { recording } = await record(source);
    for (const { name, size, parts } of recording.files) {
      const bytes = parts.reduce((sum, { data }) => sum + data.length, 0);
      expect(bytes).toBeLessThanOrEqual(size);
      if (name.endsWith(".safetensors") || name.endsWith(".gguf")) expect(bytes).toBeLessThan(size / 3);
    }
  });

  test("C1: bytes that were not read are refused, and files that were not there are not", async () => {
    const { recording } = await record(source);
    const place = recordedSource(recording);
    const weights = recording.files.find(({ name }) => /\.(safetensors|gguf)$/.test(name));
    const file = await place.open(weights?.name ?? "");
    await expect(file?.read((weights?.size ?? 0) - 8, 8)).rejects.toThrow(FaultError);
    expect(await place.open("not-there.json")).toBeUndefined();
  });
});

test("pvc:// names a claim and a path inside its volume", () => {
  expect(parsePvc("pvc://weights/models/nano")).toEqual({ claim: "weights", path: "models/nano" });
  expect(parsePvc("pvc://weights")).toEqual({ claim: "weights", path: "." });
  expect(parsePvc("pvc://weights/a%20b/x.gguf")).toEqual({ claim: "weights", path: "a b/x.gguf" });
  for (const wrong of ["pvc://weights/../other", "pvc://Weights/x", "pvc:///x", "pvc://weights/a/../../b"])
    expect(() => parsePvc(wrong), wrong).toThrow(FaultError);
});

test("where no claim is mounted pvc:// is refused by name, and s3:// everywhere", async () => {
  await expect(readModel("pvc://weights/nano")).rejects.toThrow(
    /can be read in pods only, where claim weights is mounted/,
  );
  await expect(readModel("s3://bucket/nano")).rejects.toThrow(/s3:\/\/ is not supported/);
});
