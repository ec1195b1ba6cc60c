// The files of a checkpoint and the stored tensors in them: safetensors with or without an index, GGUF with or without
// split parts. Owns which files belong together; one file's header is safetensors.ts and gguf.ts.

import { StoredType } from "../../proto/gen/muster/v1/plan.ts";
import type { ByteSource } from "./byte-source.ts";
import { readWhole } from "./byte-source.ts";
import { readGguf, splitNames } from "./gguf.ts";
import { parseJsonObject } from "./json.ts";
import { type Entry, Keys } from "./keys.ts";
import { reject, shown } from "./reject.ts";
import { readSafetensors } from "./safetensors.ts";
import type { Source } from "./sources/source.ts";
import type { Checkpoint, StoredTensor } from "./stored.ts";

const INDEX = "model.safetensors.index.json";
const SINGLE = "model.safetensors";
const INDEX_BYTES_MAX = 64 * 1024 * 1024;
const FILES_MAX = 1000;
const ROPE_FACTORS_MAX = 4096;
/** Headers of many remote shards are read side by side. */
const OPEN_AT_ONCE = 8;

export type Found = { checkpoint: Checkpoint; headers: Uint8Array[] };

/** Safetensors of a directory; undefined where it has none. */
export async function openCheckpoint(place: Source): Promise<Found | undefined> {
  const index = await place.open(INDEX);
  if (!index) {
    const single = await place.open(SINGLE);
    return single && readFiles([single]);
  }
  let bytes: Buffer;
  try {
    bytes = await readWhole(index, INDEX_BYTES_MAX);
  } finally {
    await index.close();
  }
  const weights = indexOf(bytes);
  const names = [...new Set(weights.values())].toSorted();
  if (names.length > FILES_MAX) reject(`${INDEX}/weight_map`, `names ${names.length} files, more than ${FILES_MAX}`);
  const files = await openAll(place, names, `${INDEX}/weight_map`);
  const found = await readFiles(files);
  checkIndex(weights, found.checkpoint);
  return { checkpoint: found.checkpoint, headers: [bytes, ...found.headers] };
}

/** tensor -> file. */
function indexOf(bytes: Buffer): Map<string, string> {
  const map = new Keys(INDEX, parseJsonObject(bytes, INDEX).entries).child("weight_map");
  if (!map) reject(`${INDEX}/weight_map`, "is missing");
  const weights = new Map<string, string>();
  for (const name of map.names()) {
    const file = map.text(name);
    if (!/^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$/.test(file))
      map.reject(name, `${shown(file)} is not the name of a .safetensors file beside the index`);
    weights.set(name, file);
  }
  return weights;
}

function checkIndex(weights: Map<string, string>, { tensors, files }: Checkpoint): void {
  for (const [name, file] of weights) {
    const stored = tensors.get(name);
    if (!stored) reject(`${file}/${name}`, `is missing, though ${INDEX} names it`);
    const actual = files[stored.file]?.name;
    if (actual !== file) reject(`${INDEX}/weight_map.${name}`, `names ${file}, but the tensor is in ${actual}`);
  }
  for (const { name, file, headerOffset } of tensors.values())
    if (!weights.has(name)) reject(`${files[file]?.name}/${name}`, `is not named in ${INDEX}`, headerOffset);
}

async function openAll(place: Source, names: readonly string[], field: string): Promise<ByteSource[]> {
  const files: ByteSource[] = [];
  try {
    for (let first = 0; first < names.length; first += OPEN_AT_ONCE) {
      const some = names.slice(first, first + OPEN_AT_ONCE);
      const opened = await Promise.all(some.map((name) => place.open(name)));
      files.push(...opened.filter((file) => file !== undefined));
      const missing = some.find((_, i) => opened[i] === undefined);
      if (missing !== undefined) reject(field, `${missing} does not exist beside it`);
    }
  } catch (fault) {
    for (const file of files) await file.close();
    throw fault;
  }
  return files;
}

async function readFiles(files: ByteSource[]): Promise<Found> {
  try {
    const tensors = new Map<string, StoredTensor>();
    const headers: Uint8Array[] = [];
    for (const [index, file] of files.entries()) {
      const read = await readSafetensors(file, index);
      headers.push(read.header);
      for (const tensor of read.tensors) addTensor(tensors, tensor, files);
    }
    return { checkpoint: { container: "safetensors", files, tensors }, headers };
  } catch (fault) {
    for (const file of files) await file.close();
    throw fault;
  }
}

function addTensor(tensors: Map<string, StoredTensor>, tensor: StoredTensor, files: readonly ByteSource[]): void {
  const other = tensors.get(tensor.name);
  const file = files[tensor.file]?.name;
  if (other) reject(`${file}/${tensor.name}`, `is also in ${files[other.file]?.name}`, tensor.headerOffset);
  tensors.set(tensor.name, tensor);
}

export type FoundGguf = Found & {
  /** Of the first part. */
  keys: Map<string, Entry>;
  ropeFactors: number[] | undefined;
};

/** A GGUF file, or all parts of a split one. */
export async function openGguf(place: Source, name: string): Promise<FoundGguf> {
  const names = splitNames(name);
  const first = await place.open(name);
  if (!first) reject(name, `does not exist in ${place.url}`);
  const files = [first];
  try {
    files.push(...(await openAll(place, names.slice(1), name)));
    const tensors = new Map<string, StoredTensor>();
    const headers: Uint8Array[] = [];
    let keys: Map<string, Entry> | undefined;
    for (const [index, file] of files.entries()) {
      const read = await readGguf(file);
      keys ??= read.keys;
      headers.push(read.header);
      checkSplit(new Keys(file.name, read.keys), { index, count: files.length });
      for (const tensor of read.tensors) addTensor(tensors, { ...tensor, file: index }, files);
    }
    const all = keys ?? new Map<string, Entry>();
    checkTensorCount(new Keys(name, all), tensors.size);
    const checkpoint: Checkpoint = { container: "gguf", files, tensors };
    return { checkpoint, headers, keys: all, ropeFactors: await readRopeFactors(checkpoint) };
  } catch (fault) {
    for (const file of files) await file.close();
    throw fault;
  }
}

function checkSplit(keys: Keys, { index, count }: { index: number; count: number }): void {
  const bounds = { min: 0, max: 65_535 };
  const said = keys.integer("split.count", bounds, 0);
  if (said > 1 && said !== count) keys.reject("split.count", `says ${said} parts, the file's name says ${count}`);
  const no = keys.integer("split.no", bounds, index);
  if (no !== index) keys.reject("split.no", `says part ${no}, the file's name says ${index}`);
}

function checkTensorCount(keys: Keys, count: number): void {
  const said = keys.integer("split.tensors.count", { min: 0, max: 16_777_216 }, 0);
  if (said !== 0 && said !== count) keys.reject("split.tensors.count", `says ${said} tensors, the parts have ${count}`);
}

async function readRopeFactors({ files, tensors }: Checkpoint): Promise<number[] | undefined> {
  const stored = tensors.get("rope_freqs.weight");
  const file = stored && files[stored.file];
  if (!stored || !file) return undefined;
  const field = `${file.name}/${stored.name}`;
  const [length = 0, ...more] = stored.shape;
  if (stored.type !== StoredType.F32 || more.length > 0 || length > ROPE_FACTORS_MAX)
    reject(field, `must be at most ${ROPE_FACTORS_MAX} F32 values`, stored.headerOffset);
  const bytes = await file.read(stored.offset, stored.bytes);
  return Array.from({ length }, (_, i) => {
    const factor = bytes.readFloatLE(4 * i);
    if (!(factor > 0 && factor < 1e9))
      reject(field, `value ${i} is ${factor}, it must be positive`, stored.offset + 4 * i);
    return factor;
  });
}
