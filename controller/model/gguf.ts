// The GGUF container (versions 2 and 3): key-values, then the tensor table, then aligned data.
//
//   G1  the parser is pure: it sees a prefix of the file and the file's length, and asks for more bytes where the prefix ends.
//   G2  a count is believed only as far as the file's remaining bytes could hold so many items.
//   G3  every tensor lies inside the file, aligned, as long as its shape and type say, and overlaps no other.
import { StoredType } from "../../proto/gen/muster/v1/plan.ts";
import type { ByteSource } from "./byte-source.ts";
import type { Json } from "./json.ts";
import type { Entry, KeyValue } from "./keys.ts";
import { reject, shown } from "./reject.ts";
import { elementsOf, type StoredTensor, shapeText } from "./stored.ts";

export type GgufHeader = {
  version: number;
  keys: Map<string, Entry>;
  tensors: StoredTensor[];
  /** Bytes before the data section. */
  headerBytes: number;
};

/** A header with a vocabulary of half a million and its merges is about 20 MB. */
const HEADER_BYTES_MAX = 256 * 1024 * 1024;
/** As much as a remote file brings with its first answer. */
const FIRST_READ_BYTES = 256 * 1024;
const KEYS_MAX = 65_536;
const TENSORS_MAX = 1_000_000;
const KEY_BYTES_MAX = 1024;
const STRING_BYTES_MAX = 16 * 1024 * 1024;
const ITEMS_MAX = 4_000_000;
const ARRAY_DEPTH_MAX = 2;
const DIMENSIONS_MAX = 4;
const MAGIC = "GGUF";

/** Sizes of the scalar key-value types, by type id. */
const SCALAR_BYTES = new Map([
  [0, 1],
  [1, 1],
  [2, 2],
  [3, 2],
  [4, 4],
  [5, 4],
  [6, 4],
  [7, 1],
  [10, 8],
  [11, 8],
  [12, 8],
]);
const STRING = 8;
const ARRAY = 9;

type GgmlType = { name: string; elements: number; bytes: number; type: StoredType };
const ggml = (name: string, elements: number, bytes: number, type: StoredType = StoredType.UNSPECIFIED): GgmlType => ({
  name,
  elements,
  bytes,
  type,
});
const GGML_TYPES: ReadonlyMap<number, GgmlType> = new Map([
  [0, ggml("F32", 1, 4, StoredType.F32)],
  [1, ggml("F16", 1, 2, StoredType.F16)],
  [2, ggml("Q4_0", 32, 18, StoredType.Q4_0)],
  [3, ggml("Q4_1", 32, 20, StoredType.Q4_1)],
  [6, ggml("Q5_0", 32, 22)],
  [7, ggml("Q5_1", 32, 24)],
  [8, ggml("Q8_0", 32, 34, StoredType.Q8_0)],
  [10, ggml("Q2_K", 256, 84)],
  [11, ggml("Q3_K", 256, 110)],
  [12, ggml("Q4_K", 256, 144, StoredType.Q4_K)],
  [13, ggml("Q5_K", 256, 176, StoredType.Q5_K)],
  [14, ggml("Q6_K", 256, 210, StoredType.Q6_K)],
  [20, ggml("IQ4_NL", 32, 18)],
  [23, ggml("IQ4_XS", 256, 136)],
  [24, ggml("I8", 1, 1)],
  [25, ggml("I16", 1, 2)],
  [26, ggml("I32", 1, 4)],
  [27, ggml("I64", 1, 8)],
  [28, ggml("F64", 1, 8)],
  [30, ggml("BF16", 1, 2, StoredType.BF16)],
  [39, ggml("MXFP4", 32, 17)],
]);

/** The prefix is too short; a control value of this file, never seen outside. */
class NeedMore extends Error {
  readonly bytes: number;
  constructor(bytes: number) {
    super("more of the header is needed");
    this.bytes = bytes;
  }
}

class Cursor {
  readonly view: Buffer;
  readonly file: string;
  readonly size: number;
  position = 0;
  items = 0;

  constructor(view: Buffer, file: string, size: number) {
    this.view = view;
    this.file = file;
    this.size = size;
  }

  fail(field: string, detail: string, offset = this.position): never {
    reject(field ? `${this.file}/${field}` : this.file, detail, offset);
  }

  /** Moves over `length` bytes and gives where they began. */
  take(length: number, field: string): number {
    const start = this.position;
    if (start + length > this.size) this.fail(field, `the file ends at byte ${this.size}, within this`, start);
    if (start + length > HEADER_BYTES_MAX)
      this.fail(field, `the header is longer than ${HEADER_BYTES_MAX} bytes`, start);
    if (start + length > this.view.length) throw new NeedMore(start + length);
    this.position = start + length;
    return start;
  }

  u32(field: string): number {
    return this.view.readUInt32LE(this.take(4, field));
  }

  /** A u64 that must be a count or size; `max` is what is accepted. */
  count(field: string, max: number): number {
    const offset = this.take(8, field);
    const value = this.view.readBigUInt64LE(offset);
    if (value > BigInt(max)) this.fail(field, `${value} is more than the ${max} accepted`, offset);
    return Number(value);
  }

  text(field: string, bytesMax: number): string {
    const length = this.count(field, bytesMax);
    const offset = this.take(length, field);
    return this.view.toString("utf8", offset, offset + length);
  }
}

function scalar(cursor: Cursor, type: number, field: string): KeyValue {
  const bytes = SCALAR_BYTES.get(type);
  if (bytes === undefined) cursor.fail(field, `has the unknown value type ${type}`);
  const offset = cursor.take(bytes, field);
  const view = cursor.view;
  switch (type) {
    case 0:
      return view.readUInt8(offset);
    case 1:
      return view.readInt8(offset);
    case 2:
      return view.readUInt16LE(offset);
    case 3:
      return view.readInt16LE(offset);
    case 4:
      return view.readUInt32LE(offset);
    case 5:
      return view.readInt32LE(offset);
    case 6:
      return shortest(view.readFloatLE(offset));
    case 7:
      return view.readUInt8(offset) !== 0;
    case 10:
      return exact(view.readBigUInt64LE(offset));
    case 11:
      return exact(view.readBigInt64LE(offset));
    default:
      return view.readDoubleLE(offset);
  }
}

const exact = (value: bigint): number | bigint =>
  value >= BigInt(Number.MIN_SAFE_INTEGER) && value <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : value;

/** The shortest decimal that means the same f32: an eps stored as f32 1e-5 is the 1e-5 of config.json. */
export function shortest(value: number): number {
  for (let digits = 6; digits < 9; digits++) {
    const decimal = Number(value.toPrecision(digits));
    if (Math.fround(decimal) === value) return decimal;
  }
  return value;
}

function keyValue(cursor: Cursor, type: number, place: { field: string; depth: number }): KeyValue {
  const { field, depth } = place;
  if (type === STRING) return cursor.text(field, STRING_BYTES_MAX);
  if (type !== ARRAY) return scalar(cursor, type, field);
  if (depth >= ARRAY_DEPTH_MAX) cursor.fail(field, `arrays are nested deeper than ${ARRAY_DEPTH_MAX}`);
  const itemType = cursor.u32(field);
  const itemBytes = SCALAR_BYTES.get(itemType) ?? (itemType === STRING ? 8 : itemType === ARRAY ? 12 : 0);
  if (itemBytes === 0) cursor.fail(field, `has the unknown item type ${itemType}`, cursor.position - 4);
  const countOffset = cursor.position;
  const length = cursor.count(field, ITEMS_MAX);
  if (length * itemBytes > cursor.size - cursor.position)
    cursor.fail(field, `claims ${length} items, more than the rest of the file can hold`, countOffset);
  cursor.items += length;
  if (cursor.items > ITEMS_MAX) cursor.fail(field, `more than ${ITEMS_MAX} array items in all`, countOffset);
  const items: Json[] = [];
  for (let i = 0; i < length; i++) {
    const item = keyValue(cursor, itemType, { field, depth: depth + 1 });
    items.push(typeof item === "bigint" ? Number(item) : item);
  }
  return items;
}

type TensorInfo = { name: string; ne: number[]; ggml: GgmlType; relative: number; headerOffset: number };

function tensorInfo(cursor: Cursor, index: number): TensorInfo {
  const headerOffset = cursor.position;
  const name = cursor.text(`tensor ${index} name`, KEY_BYTES_MAX);
  if (name.length === 0) cursor.fail(`tensor ${index} name`, "is empty", headerOffset);
  const dimensions = cursor.u32(name);
  if (dimensions < 1 || dimensions > DIMENSIONS_MAX)
    cursor.fail(name, `has ${dimensions} dimensions, 1..${DIMENSIONS_MAX} are accepted`, cursor.position - 4);
  const ne: number[] = [];
  for (let d = 0; d < dimensions; d++) {
    const size = cursor.count(`${name} dimension ${d}`, Number.MAX_SAFE_INTEGER);
    if (size === 0) cursor.fail(name, `dimension ${d} is 0`, cursor.position - 8);
    ne.push(size);
  }
  const typeId = cursor.u32(name);
  const type = GGML_TYPES.get(typeId);
  if (!type) cursor.fail(name, `has the unknown type ${typeId}`, cursor.position - 4);
  if ((ne[0] ?? 0) % type.elements !== 0)
    cursor.fail(name, `rows of ${ne[0]} do not divide into blocks of ${type.elements} (${type.name})`, headerOffset);
  const relative = cursor.count(`${name} offset`, Number.MAX_SAFE_INTEGER);
  return { name, ne, ggml: type, relative, headerOffset };
}

/** Pure (G1). `prefix` begins at byte 0 of a file of `size` bytes; answers how many bytes are needed where it is too short. */
export function parseGguf(prefix: Buffer, file: string, size: number): GgufHeader | { need: number } {
  try {
    return parse(new Cursor(prefix, file, size));
  } catch (fault) {
    if (fault instanceof NeedMore) return { need: fault.bytes };
    throw fault;
  }
}

function parse(cursor: Cursor): GgufHeader {
  const magic = cursor.take(4, "magic");
  if (cursor.view.toString("latin1", magic, magic + 4) !== MAGIC)
    cursor.fail("magic", "this is not a GGUF file", magic);
  const version = cursor.u32("version");
  if (version !== 2 && version !== 3) cursor.fail("version", `${version} is not supported, 2 and 3 are`, 4);
  const tensorCount = cursor.count("tensor count", TENSORS_MAX);
  const keyCount = cursor.count("key count", KEYS_MAX);
  if (tensorCount * 32 + keyCount * 13 > cursor.size)
    cursor.fail("tensor count", `${tensorCount} tensors and ${keyCount} keys do not fit into ${cursor.size} bytes`, 8);
  const keys = new Map<string, Entry>();
  for (let i = 0; i < keyCount; i++) {
    const keyOffset = cursor.position;
    const key = cursor.text(`key ${i}`, KEY_BYTES_MAX);
    if (keys.has(key)) cursor.fail(key, "appears twice", keyOffset);
    const type = cursor.u32(key);
    const offset = cursor.position;
    keys.set(key, { value: keyValue(cursor, type, { field: key, depth: 0 }), offset });
  }
  const infos = Array.from({ length: tensorCount }, (_, i) => tensorInfo(cursor, i));
  return { version, keys, tensors: place(cursor, keys, infos), headerBytes: cursor.position };
}

function place(cursor: Cursor, keys: Map<string, Entry>, infos: TensorInfo[]): StoredTensor[] {
  const alignment = keys.get("general.alignment")?.value ?? 32;
  if (
    typeof alignment !== "number" ||
    alignment < 1 ||
    alignment > 65_536 ||
    alignment % 1 ||
    alignment & (alignment - 1)
  )
    cursor.fail("general.alignment", "must be a power of two of 1..65536", keys.get("general.alignment")?.offset ?? 0);
  const dataStart = Math.ceil(cursor.position / alignment) * alignment;
  const seen = new Set<string>();
  const tensors = infos.map((info): StoredTensor => {
    if (seen.has(info.name)) cursor.fail(info.name, "appears twice", info.headerOffset);
    seen.add(info.name);
    const elements = elementsOf(info.ne);
    const bytes = elements === undefined ? Number.NaN : (elements / info.ggml.elements) * info.ggml.bytes;
    const offset = dataStart + info.relative;
    if (info.relative % alignment !== 0)
      cursor.fail(info.name, `offset ${info.relative} is not a multiple of ${alignment}`, info.headerOffset);
    if (!(offset + bytes <= cursor.size)) {
      const what = `${info.ggml.name} ${shapeText(info.ne)} from byte ${offset} does not fit into ${cursor.size} bytes`;
      cursor.fail(info.name, `${what}; the file is truncated or the header lies`, info.headerOffset);
    }
    const shape = info.ne.toReversed();
    const { name, headerOffset } = info;
    return { name, typeName: info.ggml.name, type: info.ggml.type, shape, file: 0, offset, bytes, headerOffset };
  });
  let end = dataStart;
  for (const tensor of tensors.toSorted((a, b) => a.offset - b.offset)) {
    if (tensor.offset < end) cursor.fail(tensor.name, "overlaps the tensor before it", tensor.headerOffset);
    end = tensor.offset + tensor.bytes;
  }
  return tensors;
}

/** Reads the header of one file, prefix by prefix, each at least twice as long as the last. */
export async function readGguf(source: ByteSource): Promise<GgufHeader & { header: Buffer }> {
  let length = Math.min(FIRST_READ_BYTES, source.size);
  for (;;) {
    const prefix = await source.read(0, length);
    const answer = parseGguf(prefix, source.name, source.size);
    if ("tensors" in answer) return { ...answer, header: prefix.subarray(0, answer.headerBytes) };
    length = Math.min(source.size, HEADER_BYTES_MAX, Math.max(answer.need, length * 4));
  }
}

/** Names of a split file's parts, "x-00001-of-00003.gguf"; just the name where it is not split. */
export function splitNames(name: string): string[] {
  const match = /^(.*)-(\d{5})-of-(\d{5})\.gguf$/.exec(name);
  if (!match) return [name];
  const [, base, first, count] = match;
  const parts = Number(count);
  if (first !== "00001")
    reject(name, `name the first part of a split file, ${shown(`${base}-00001-of-${count}.gguf`)}`);
  if (parts < 1 || parts > 1000) reject(name, `a split into ${parts} parts is not accepted`);
  return Array.from({ length: parts }, (_, i) => `${base}-${String(i + 1).padStart(5, "0")}-of-${count}.gguf`);
}
