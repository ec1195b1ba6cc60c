// A bounded JSON parser over bytes. Ours because what is read here comes from strangers: every value carries its byte
// offset, duplicate keys are errors (JSON.parse keeps the last), depth and count are bounded before anything is built, and
// NaN and Infinity, which Python writes, are refused by name.
import { reject, shown } from "./reject.ts";

export type Json = null | boolean | number | string | Json[] | JsonObject;
export type JsonEntry = { value: Json; offset: number };
/** An object with the offset of each value; a Map, so that "__proto__" is a key like any other. */
export class JsonObject {
  readonly entries = new Map<string, JsonEntry>();
}

export type JsonLimits = { depth: number; values: number };
/** 4 M values: the header of a million tensors, well under a gigabyte of memory. */
const LIMITS: JsonLimits = { depth: 32, values: 4_000_000 };

const utf8 = new TextDecoder("utf-8", { fatal: true });
const NUMBER = /^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$/;
const ESCAPES: Record<string, string> = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
const QUOTE = 0x22;
const BACKSLASH = 0x5c;
/** Bytes of numbers and names. */
const WORD: Uint8Array = Uint8Array.from({ length: 256 }, (_, byte) =>
  /[-+.0-9A-Za-z]/.test(String.fromCharCode(byte)) ? 1 : 0,
);

class Parser {
  readonly bytes: Buffer;
  readonly file: string;
  readonly limits: JsonLimits;
  position = 0;
  values = 0;

  constructor(bytes: Uint8Array, file: string, limits: JsonLimits) {
    this.bytes = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.file = file;
    this.limits = limits;
  }

  fail(detail: string, offset = this.position): never {
    reject(this.file, `not valid JSON: ${detail}`, offset);
  }

  space(): void {
    for (;;) {
      const byte = this.bytes[this.position];
      if (byte !== 0x20 && byte !== 0x0a && byte !== 0x0d && byte !== 0x09) return;
      this.position++;
    }
  }

  peek(): string {
    const byte = this.bytes[this.position];
    return byte === undefined ? this.fail("it ends too early") : String.fromCharCode(byte);
  }

  expect(character: string): void {
    if (this.bytes[this.position] !== character.charCodeAt(0))
      this.fail(`expected ${shown(character)}, found ${shown(this.peek())}`);
    this.position++;
  }

  value(depth: number): Json {
    if (depth > this.limits.depth) this.fail(`nested deeper than ${this.limits.depth}`);
    if (++this.values > this.limits.values) this.fail(`more than ${this.limits.values} values`);
    this.space();
    switch (this.peek()) {
      case "{":
        return this.object(depth);
      case "[":
        return this.array(depth);
      case '"':
        return this.text();
      default:
        return this.word();
    }
  }

  object(depth: number): JsonObject {
    const object = new JsonObject();
    this.expect("{");
    this.space();
    if (this.peek() === "}") {
      this.position++;
      return object;
    }
    for (;;) {
      this.space();
      const keyOffset = this.position;
      const key = this.text();
      if (object.entries.has(key)) this.fail(`key ${shown(key)} appears twice`, keyOffset);
      this.space();
      this.expect(":");
      this.space();
      const offset = this.position;
      object.entries.set(key, { value: this.value(depth + 1), offset });
      this.space();
      if (this.peek() === "}") break;
      this.expect(",");
    }
    this.position++;
    return object;
  }

  array(depth: number): Json[] {
    const items: Json[] = [];
    this.expect("[");
    this.space();
    if (this.peek() === "]") {
      this.position++;
      return items;
    }
    for (;;) {
      items.push(this.value(depth + 1));
      this.space();
      if (this.peek() === "]") break;
      this.expect(",");
    }
    this.position++;
    return items;
  }

  text(): string {
    const start = this.position;
    this.expect('"');
    let escaped = false;
    let bits = 0;
    for (;;) {
      const byte = this.bytes[this.position];
      if (byte === undefined) this.fail("a string does not end", start);
      if (byte === QUOTE) break;
      if (byte < 0x20) this.fail("a control character in a string");
      bits |= byte;
      if (byte === BACKSLASH) {
        escaped = true;
        this.position++;
      }
      this.position++;
    }
    const end = this.position++;
    // A byte after a backslash is not looked at here: only plain text takes the fast way.
    const text = bits < 0x80 && !escaped ? this.bytes.toString("latin1", start + 1, end) : this.decode(start + 1, end);
    return escaped ? this.unescape(text, start) : text;
  }

  decode(start: number, end: number): string {
    // Only a replacement character can hide a mistake; the strict decoder is slow on short strings.
    const text = this.bytes.toString("utf8", start, end);
    if (!text.includes("\ufffd")) return text;
    try {
      return utf8.decode(this.bytes.subarray(start, end));
    } catch {
      return this.fail("a string is not UTF-8", start - 1);
    }
  }

  unescape(text: string, start: number): string {
    return text.replace(/\\(u[0-9a-fA-F]{4}|[\s\S])/g, (_, code: string) => {
      if (code.length === 5) return String.fromCharCode(Number.parseInt(code.slice(1), 16));
      return ESCAPES[code] ?? this.fail(`unknown escape \\${code}`, start);
    });
  }

  word(): null | boolean | number {
    const start = this.position;
    while (WORD[this.bytes[this.position] ?? 0] === 1) this.position++;
    const word = this.bytes.toString("latin1", start, Math.min(this.position, start + 400));
    if (word === "true") return true;
    if (word === "false") return false;
    if (word === "null") return null;
    const number = NUMBER.test(word) ? Number(word) : Number.NaN;
    if (!Number.isFinite(number)) this.fail(`${shown(word || this.peek())} is not a value`, start);
    return number;
  }
}

/** The value in `bytes`, which are of `file`. Throws FaultError INVALID with the byte offset. */
export function parseJson(bytes: Uint8Array, file: string, limits: JsonLimits = LIMITS): Json {
  const parser = new Parser(bytes, file, limits);
  const value = parser.value(0);
  parser.space();
  if (parser.position < bytes.length) parser.fail("something follows the value");
  return value;
}

/** As parseJson, where the value must be an object. */
export function parseJsonObject(bytes: Uint8Array, file: string, limits: JsonLimits = LIMITS): JsonObject {
  const value = parseJson(bytes, file, limits);
  return value instanceof JsonObject ? value : reject(file, "must be a JSON object", 0);
}
