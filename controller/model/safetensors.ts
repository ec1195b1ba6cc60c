// The safetensors container: 8 bytes of header length, a JSON header, then the data.
//
//   S1  nothing is allocated from a length that the file itself cannot back.
//   S2  the tensors tile the data section: from 0 to its end, without gap or overlap, each as long as its shape says.
import { StoredType } from "../../proto/gen/muster/v1/plan.ts";
import type { ByteSource } from "./byte-source.ts";
import { JsonObject, parseJsonObject } from "./json.ts";
import { type Bounds, Keys } from "./keys.ts";
import { reject, shown } from "./reject.ts";
import { elementsOf, type StoredTensor, shapeText } from "./stored.ts";

/** The bound of the reference implementation. */
export const HEADER_BYTES_MAX = 100_000_000;
const DIMENSIONS_MAX = 8;
const OFFSET: Bounds = { min: 0, max: Number.MAX_SAFE_INTEGER };
const NAME_LENGTH_MAX = 512;

const DTYPES: ReadonlyMap<string, { bytes: number; type: StoredType }> = new Map([
  ["F64", { bytes: 8, type: StoredType.UNSPECIFIED }],
  ["F32", { bytes: 4, type: StoredType.F32 }],
  ["F16", { bytes: 2, type: StoredType.F16 }],
  ["BF16", { bytes: 2, type: StoredType.BF16 }],
  ["F8_E4M3", { bytes: 1, type: StoredType.F8_E4M3 }],
  ["F8_E5M2", { bytes: 1, type: StoredType.UNSPECIFIED }],
  ["F8_E8M0", { bytes: 1, type: StoredType.UNSPECIFIED }],
  ["I64", { bytes: 8, type: StoredType.UNSPECIFIED }],
  ["I32", { bytes: 4, type: StoredType.UNSPECIFIED }],
  ["I16", { bytes: 2, type: StoredType.UNSPECIFIED }],
  ["I8", { bytes: 1, type: StoredType.UNSPECIFIED }],
  ["U64", { bytes: 8, type: StoredType.UNSPECIFIED }],
  ["U32", { bytes: 4, type: StoredType.UNSPECIFIED }],
  ["U16", { bytes: 2, type: StoredType.UNSPECIFIED }],
  ["U8", { bytes: 1, type: StoredType.UNSPECIFIED }],
  ["BOOL", { bytes: 1, type: StoredType.UNSPECIFIED }],
]);

export type SafetensorsHeader = { tensors: StoredTensor[]; header: Buffer };

/** Reads the header of one file; `file` is its index in the checkpoint. */
export async function readSafetensors(source: ByteSource, file: number): Promise<SafetensorsHeader> {
  if (source.size < 8) reject(source.name, `has ${source.size} bytes, too short for a safetensors header`, source.size);
  const length = (await source.read(0, 8)).readBigUInt64LE(0);
  if (length > BigInt(HEADER_BYTES_MAX))
    reject(`${source.name}/header length`, `${length} is more than the ${HEADER_BYTES_MAX} accepted`, 0);
  if (length + 8n > BigInt(source.size))
    reject(`${source.name}/header length`, `${length} goes beyond the file's ${source.size} bytes`, 0);
  const header = await source.read(8, Number(length));
  return { tensors: parseSafetensorsHeader(header, { name: source.name, size: source.size }, file), header };
}

/** Pure: `header` are the bytes after the length; offsets in messages count from the start of the file. */
export function parseSafetensorsHeader(
  header: Uint8Array,
  source: { name: string; size: number },
  file: number,
): StoredTensor[] {
  const dataStart = 8 + header.length;
  const tensors: StoredTensor[] = [];
  for (const [name, { value, offset }] of parseJsonObject(header, source.name).entries) {
    if (name === "__metadata__") continue;
    const field = `${source.name}/${name.slice(0, 80)}`;
    if (name.length === 0 || name.length > NAME_LENGTH_MAX) reject(field, "has an unusable name", 8 + offset);
    if (!(value instanceof JsonObject)) reject(field, "must be an object", 8 + offset);
    const keys = new Keys(source.name, value.entries, { path: `${name.slice(0, 80)}.` });
    tensors.push({ ...oneTensor(keys, dataStart), name, file, headerOffset: 8 + offset });
  }
  checkTiling(tensors, source, dataStart);
  return tensors;
}

function oneTensor(keys: Keys, dataStart: number): Omit<StoredTensor, "name" | "file" | "headerOffset"> {
  const typeName = keys.text("dtype");
  const dtype = DTYPES.get(typeName);
  if (!dtype) keys.reject("dtype", `${shown(typeName)} is not a known dtype`);
  const shape = keys.integers("shape", DIMENSIONS_MAX, OFFSET);
  if (!shape) keys.reject("shape", "is missing");
  const [begin, end, ...more] = keys.integers("data_offsets", 2, OFFSET) ?? [];
  if (begin === undefined || end === undefined || more.length > 0)
    keys.reject("data_offsets", "must be two integers, [begin, end]");
  if (end < begin) keys.reject("data_offsets", `end ${end} lies before begin ${begin}`);
  const elements = elementsOf(shape);
  if (elements === undefined || elements * dtype.bytes !== end - begin)
    keys.reject("data_offsets", `${end - begin} bytes, but ${typeName} ${shapeText(shape)} needs another number`);
  return { typeName, type: dtype.type, shape, offset: dataStart + begin, bytes: end - begin };
}

function checkTiling(tensors: StoredTensor[], source: { name: string; size: number }, dataStart: number): void {
  let next = dataStart;
  for (const tensor of tensors.toSorted((a, b) => a.offset - b.offset || a.bytes - b.bytes)) {
    if (tensor.offset !== next) {
      const what = tensor.offset < next ? "overlaps the tensor before it" : "leaves a gap before it";
      const field = `${source.name}/${tensor.name}.data_offsets`;
      reject(field, `${what}: begins at ${tensor.offset - dataStart}, not ${next - dataStart}`, tensor.headerOffset);
    }
    next += tensor.bytes;
  }
  if (next !== source.size)
    reject(source.name, `has ${source.size} bytes, but its header describes ${next}; download it again`, next);
}
