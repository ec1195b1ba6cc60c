// GGUF models in several files: read as one, refused by name where the parts do not belong together.
import { expect, test } from "vitest";
import { readModel } from "../../../controller/model/model.ts";
import { cacheDir, folder, type GgufParts, gguf, le32, refusal, tinyKeys, tinyTensors, u32 } from "./craft.ts";

const part = (keys: GgufParts["keys"], tensors: GgufParts["tensors"]) => gguf({ keys, tensors });
const u16 = (value: number) => ({ type: 2, bytes: le32(value).subarray(0, 2) });
const splitKeys = (no: number): GgufParts["keys"] => [
  ["split.no", u16(no)],
  ["split.count", u16(2)],
  ["split.tensors.count", u32(tinyTensors.length)],
];

test("a split file is read from all of its parts", async () => {
  const path = folder({
    "m-00001-of-00002.gguf": part([...tinyKeys, ...splitKeys(0)], tinyTensors.slice(0, 5)),
    "m-00002-of-00002.gguf": part(splitKeys(1), tinyTensors.slice(5)),
  });
  const spec = await readModel(`file://${path}/m-00001-of-00002.gguf`, { cacheDir });
  expect(spec.files.map((file) => file.name)).toEqual(["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
  expect(spec.parameters).toBe(696n);
  expect(new Set(spec.tensors.map((tensor) => tensor.file))).toEqual(new Set([0, 1]));
});

const SPLITS: [string, Record<string, Buffer>, string, string][] = [
  [
    "a missing part",
    { "m-00001-of-00002.gguf": part([...tinyKeys, ...splitKeys(0)], tinyTensors) },
    "m-00001-of-00002.gguf",
    "m-00002-of-00002.gguf does not exist",
  ],
  [
    "the second part named",
    { "m-00002-of-00002.gguf": part(splitKeys(1), []) },
    "m-00002-of-00002.gguf",
    "name the first part",
  ],
  [
    "parts out of order",
    {
      "m-00001-of-00002.gguf": part([...tinyKeys, ...splitKeys(0)], tinyTensors),
      "m-00002-of-00002.gguf": part(splitKeys(0), []),
    },
    "m-00001-of-00002.gguf",
    "split.no: says part 0, the file's name says 1",
  ],
  [
    "a tensor in two parts",
    {
      "m-00001-of-00002.gguf": part([...tinyKeys, ...splitKeys(0)], tinyTensors),
      "m-00002-of-00002.gguf": part(splitKeys(1), [{ name: "output_norm.weight", ne: [8] }]),
    },
    "m-00001-of-00002.gguf",
    "m-00002-of-00002.gguf/output_norm.weight: is also in m-00001-of-00002.gguf",
  ],
  [
    "tensors that no part has",
    {
      "m-00001-of-00002.gguf": part([...tinyKeys, ...splitKeys(0)], tinyTensors.slice(0, 5)),
      "m-00002-of-00002.gguf": part(splitKeys(1), []),
    },
    "m-00001-of-00002.gguf",
    "split.tensors.count: says 11 tensors, the parts have 5",
  ],
];
for (const [what, files, name, message] of SPLITS)
  test(`a split file with ${what} is refused`, async () =>
    expect(await refusal(`file://${folder(files)}/${name}`)).toContain(message));
