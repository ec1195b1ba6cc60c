// Typed reading of named values: config.json objects and GGUF key-values alike. Every reader has bounds, and whoever
// breaks them is named by file, key and byte offset.
import { type Json, JsonObject } from "./json.ts";
import { reject, shown, unsupported } from "./reject.ts";

export type KeyValue = Json | bigint;
export type Entry = { value: KeyValue; offset: number };
export type Bounds = { min: number; max: number };

/** Larger than any model's dimension, small enough that products of three stay exact. */
export const DIMENSION: Bounds = { min: 1, max: 16_777_216 };
export const COUNT: Bounds = { min: 0, max: 16_777_216 };
export const TOKEN_ID: Bounds = { min: 0, max: 16_777_216 };

export class Keys {
  readonly file: string;
  readonly #entries: ReadonlyMap<string, Entry>;
  readonly #prefix: string;
  readonly #path: string;

  /** `prefix` goes before every key looked up (GGUF: "llama."), `path` before its name in messages (JSON: "text_config."). */
  constructor(file: string, entries: ReadonlyMap<string, Entry>, names: { prefix?: string; path?: string } = {}) {
    this.file = file;
    this.#entries = entries;
    this.#prefix = names.prefix ?? "";
    this.#path = names.path ?? "";
  }

  prefixed(prefix: string): Keys {
    return new Keys(this.file, this.#entries, { prefix, path: this.#path });
  }

  field(key: string): string {
    return `${this.file}/${this.#path}${this.#prefix}${key}`;
  }

  names(): string[] {
    return [...this.#entries.keys()];
  }

  reject(key: string, detail: string): never {
    reject(this.field(key), detail, this.#entries.get(this.#prefix + key)?.offset);
  }

  /** For what is well-formed but not built. */
  unsupported(key: string, detail: string): never {
    unsupported(this.field(key), detail, this.#entries.get(this.#prefix + key)?.offset);
  }

  /** The raw value; null counts as absent, as Python configurations write it. */
  raw(key: string): KeyValue | undefined {
    return this.#entries.get(this.#prefix + key)?.value ?? undefined;
  }

  has(key: string): boolean {
    return this.raw(key) !== undefined;
  }

  integer(key: string, bounds: Bounds, fallback?: number): number {
    const value = this.raw(key);
    if (value === undefined) return fallback ?? this.reject(key, "is missing");
    if (typeof value !== "number" || !Number.isInteger(value) || value < bounds.min || value > bounds.max)
      this.reject(key, `must be an integer of ${bounds.min}..${bounds.max}, is ${describe(value)}`);
    return value;
  }

  number(key: string, bounds: Bounds, fallback?: number): number {
    const value = this.raw(key);
    if (value === undefined) return fallback ?? this.reject(key, "is missing");
    if (typeof value !== "number" || !(value >= bounds.min && value <= bounds.max))
      this.reject(key, `must be a number of ${bounds.min}..${bounds.max}, is ${describe(value)}`);
    return value;
  }

  flag(key: string, fallback: boolean): boolean {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== "boolean") this.reject(key, `must be true or false, is ${describe(value)}`);
    return value;
  }

  /** As flag, where early configurations wrote a number: anything but 0 is on. */
  truthy(key: string, fallback: boolean): boolean {
    const value = this.raw(key) ?? fallback;
    if (typeof value !== "boolean" && typeof value !== "number")
      this.reject(key, `must be true or false, is ${describe(value)}`);
    return Boolean(value);
  }

  text(key: string, fallback?: string): string {
    const value = this.raw(key) ?? fallback;
    if (value === undefined) this.reject(key, "is missing");
    if (typeof value !== "string") this.reject(key, `must be a string, is ${describe(value)}`);
    return value;
  }

  list(key: string, lengthMax: number): readonly Json[] | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (!Array.isArray(value)) this.reject(key, `must be an array, is ${describe(value)}`);
    if (value.length > lengthMax) this.reject(key, `must have at most ${lengthMax} items, has ${value.length}`);
    return value;
  }

  texts(key: string, lengthMax: number): string[] | undefined {
    return this.list(key, lengthMax)?.map((item, i) =>
      typeof item === "string" ? item : this.reject(key, `item ${i} must be a string, is ${describe(item)}`),
    );
  }

  integers(key: string, lengthMax: number, bounds: Bounds): number[] | undefined {
    return this.list(key, lengthMax)?.map((item, i) =>
      typeof item === "number" && Number.isInteger(item) && item >= bounds.min && item <= bounds.max
        ? item
        : this.reject(key, `item ${i} must be an integer of ${bounds.min}..${bounds.max}, is ${describe(item)}`),
    );
  }

  /** An id or a list of ids; empty where there is none. */
  ids(key: string): number[] {
    const value = this.raw(key);
    if (value === undefined) return [];
    return Array.isArray(value) ? (this.integers(key, 64, TOKEN_ID) ?? []) : [this.integer(key, TOKEN_ID)];
  }

  child(key: string): Keys | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (!(value instanceof JsonObject)) this.reject(key, `must be an object, is ${describe(value)}`);
    return new Keys(this.file, value.entries, { path: `${this.#path}${key}.` });
  }
}

export function describe(value: KeyValue): string {
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (value instanceof JsonObject) return "an object";
  return typeof value === "string" ? shown(value) : String(value);
}
