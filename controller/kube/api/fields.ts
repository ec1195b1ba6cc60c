// Reading fields out of objects whose shape another program owns. Total: what is missing or of another type is undefined or
// empty, never an exception, because one odd object must not stop the view of all others.

export type Fields = Readonly<Record<string, unknown>>;

const EMPTY: Fields = {};

export function fieldsOf(value: unknown): Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Fields) : EMPTY;
}

export function listOf(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

export function textOf(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

/** Only the entries that are text. */
export function textsOf(value: unknown): Readonly<Record<string, string>> {
  const fields = fieldsOf(value);
  const isClean = Object.values(fields).every((each) => typeof each === "string");
  if (isClean) return fields as Readonly<Record<string, string>>;
  return Object.fromEntries(
    Object.entries(fields).flatMap(([key, each]) => (typeof each === "string" ? [[key, each]] : [])),
  );
}

/** A whole number written as number or text ("8"), as device counts are; 0 for anything else. */
export function countOf(value: unknown): number {
  if (typeof value === "number") return Number.isSafeInteger(value) && value > 0 ? value : 0;
  return typeof value === "string" && /^\d{1,15}$/.test(value) ? Number(value) : 0;
}

/** RFC 3339; undefined where it is none. */
export function millisOf(value: unknown): number | undefined {
  const at = typeof value === "string" ? Date.parse(value) : Number.NaN;
  return Number.isNaN(at) ? undefined : at;
}
