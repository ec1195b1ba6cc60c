// From a zod schema to the structural OpenAPI v3 schema of a CRD. Owns what an API server takes and what it refuses; owns no
// field. Throws for a schema that cannot be said structurally: that is a broken kind, found by the first test.
//
//   T1  every node has a type, or is an int-or-string.
//   T2  no keyword that an API server refuses or drops silently; unknown keywords throw.
//   T3  every array states its list type, every string, list and map under a rule its bound.
import { z } from "zod";
import { VALIDATIONS } from "./rules.ts";

export type JsonSchema = { readonly [keyword: string]: unknown };

const INTEGER_MAX = Number.MAX_SAFE_INTEGER;

/** Keywords that stand as they are. */
const KEPT: ReadonlySet<string> = new Set([
  "type",
  "description",
  "default",
  "enum",
  "nullable",
  "required",
  "minimum",
  "maximum",
  "exclusiveMinimum",
  "exclusiveMaximum",
  "minLength",
  "maxLength",
  "pattern",
  "minItems",
  "maxItems",
  "maxProperties",
  "x-kubernetes-list-type",
  "x-kubernetes-list-map-keys",
  "x-kubernetes-int-or-string",
  VALIDATIONS,
]);

/** Keywords of zod that say nothing to an API server. */
const DROPPED: ReadonlySet<string> = new Set(["$schema", "propertyNames"]);

export function toStructural(schema: z.ZodType): JsonSchema {
  return structural(z.toJSONSchema(schema, { target: "openapi-3.0", io: "input", unrepresentable: "throw" }), "");
}

function structural(node: unknown, path: string): JsonSchema {
  const given = intOrString(objectAt(node, path), path);
  const made: Record<string, unknown> = {};
  for (const [keyword, value] of Object.entries(given)) Object.assign(made, converted(keyword, value, path));
  if (made.type === "integer") Object.assign(made, integer(made));
  if (made.format === "date-time") delete made.pattern;
  if (made.type === undefined && made["x-kubernetes-int-or-string"] !== true) throw broken(path, "has no type");
  if (made.type === "array" && made["x-kubernetes-list-type"] === undefined) throw broken(path, "has no list type");
  return made;
}

function converted(keyword: string, value: unknown, path: string): JsonSchema {
  if (DROPPED.has(keyword)) return {};
  if (KEPT.has(keyword)) return exclusive(keyword, value);
  switch (keyword) {
    case "properties": {
      const fields = Object.entries(objectAt(value, path));
      return {
        properties: Object.fromEntries(fields.map(([name, child]) => [name, structural(child, `${path}.${name}`)])),
      };
    }
    case "items":
      return { items: structural(value, `${path}[]`) };
    case "additionalProperties":
      // A closed object is what an API server makes of every object: unknown fields are pruned, or refused where strict.
      return value === false ? {} : { additionalProperties: structural(value, `${path}{}`) };
    case "format":
      if (value === "date-time") return { format: value };
      throw broken(path, `has format ${String(value)}, which an API server does not check`);
    default:
      throw broken(path, `uses ${keyword}, which is not structural`);
  }
}

/** `exclusiveMinimum: 3` of later drafts is `minimum: 3, exclusiveMinimum: true` in OpenAPI 3.0. */
function exclusive(keyword: string, value: unknown): JsonSchema {
  if (keyword === "exclusiveMinimum" && typeof value === "number") return { minimum: value, exclusiveMinimum: true };
  if (keyword === "exclusiveMaximum" && typeof value === "number") return { maximum: value, exclusiveMaximum: true };
  return { [keyword]: value };
}

/** zod bounds integers by what JavaScript counts exactly; an API server has 64 bits and needs no such bound. */
function integer(made: Record<string, unknown>): JsonSchema {
  if (made.minimum === -INTEGER_MAX) delete made.minimum;
  if (made.maximum === INTEGER_MAX) delete made.maximum;
  return { format: "int64" };
}

/** A union of an integer and a string is the only union that a structural schema has. */
function intOrString(node: JsonSchema, path: string): JsonSchema {
  const { anyOf, ...rest } = node;
  if (anyOf === undefined) return node;
  const sides = Array.isArray(anyOf) ? anyOf.map((side) => objectAt(side, path)) : [];
  const text = sides.find(({ type }) => type === "string");
  if (sides.length !== 2 || text === undefined || !sides.some(({ type }) => type === "integer"))
    throw broken(path, "is a union of other things than an integer and a string");
  // The length bounds the cost of rules; the integer's bounds would be checked against strings too.
  return { ...rest, "x-kubernetes-int-or-string": true, maxLength: text.maxLength };
}

function objectAt(value: unknown, path: string): JsonSchema {
  if (typeof value === "object" && value !== null && !Array.isArray(value)) return { ...value };
  throw broken(path, "is no schema");
}

function broken(path: string, what: string): Error {
  return new Error(`schema${path} ${what}`);
}
