import { readdirSync, readFileSync } from "node:fs";
import { basename } from "node:path";
import { describe, expect, test } from "vitest";
import { parse } from "yaml";
import { z } from "zod";
import { allCrds, crdOf } from "../../../controller/api/crd.ts";
import { GROUP, KINDS, NAMES } from "../../../controller/api/meta.ts";
import { VALIDATIONS, withRules } from "../../../controller/api/rules.ts";
import { type JsonSchema, toStructural } from "../../../controller/api/structural.ts";
import { CRDS_FOLDER, crdFiles } from "../../../controller/api/write-crds.ts";
import { schemaNodes } from "./leaves.ts";

const isSchema = (value: unknown): value is JsonSchema =>
  typeof value === "object" && value !== null && !Array.isArray(value);

function at(value: unknown, ...keys: (string | number)[]): unknown {
  return keys.reduce<unknown>((one, key) => {
    if (Array.isArray(one)) return one[Number(key)];
    return isSchema(one) ? one[key] : undefined;
  }, value);
}

function schemaOf(kind: (typeof KINDS)[number]): JsonSchema {
  const schema = at(crdOf(kind), "spec", "versions", 0, "schema", "openAPIV3Schema");
  if (!isSchema(schema)) throw new Error(`${kind} has no schema`);
  return schema;
}

const allNodes = KINDS.flatMap((kind) =>
  schemaNodes(schemaOf(kind)).map(({ path, node }) => ({ path: `${kind}.${path}`, node })),
);

describe("from zod to a structural schema", () => {
  test("an integer loses JavaScript's bounds and keeps its own", () => {
    const schema = toStructural(z.object({ a: z.int(), b: z.int().min(1).max(9) }));
    expect(at(schema, "properties")).toEqual({
      a: { type: "integer", format: "int64" },
      b: { type: "integer", format: "int64", minimum: 1, maximum: 9 },
    });
  });

  test("defaults stay, and what has one is not required", () => {
    const inner = z.strictObject({ kind: z.enum(["a", "b"]).default("a"), n: z.int().default(3) }).prefault({});
    expect(toStructural(z.strictObject({ inner, must: z.boolean() }))).toEqual({
      type: "object",
      required: ["must"],
      properties: {
        must: { type: "boolean" },
        inner: {
          type: "object",
          default: {},
          properties: {
            kind: { type: "string", enum: ["a", "b"], default: "a" },
            n: { type: "integer", format: "int64", default: 3 },
          },
        },
      },
    });
  });

  test("an integer or a string is int-or-string with the string's length", () => {
    expect(toStructural(z.union([z.int().min(0), z.string().max(7)]))).toEqual({
      "x-kubernetes-int-or-string": true,
      maxLength: 7,
    });
  });

  test("exclusive bounds are those of OpenAPI 3.0, null stays null, times keep their format alone", () => {
    expect(toStructural(z.number().gt(0).lt(2))).toEqual({
      type: "number",
      minimum: 0,
      exclusiveMinimum: true,
      maximum: 2,
      exclusiveMaximum: true,
    });
    expect(toStructural(z.string().nullable())).toEqual({ type: "string", nullable: true });
    expect(toStructural(z.iso.datetime())).toEqual({ type: "string", format: "date-time" });
  });

  test("a map keeps the schema of its values; that of its keys has no place", () => {
    expect(toStructural(z.record(z.string().max(3), z.boolean()))).toEqual({
      type: "object",
      additionalProperties: { type: "boolean" },
    });
  });

  test("rules of two layers stand side by side", () => {
    const rule = (cel: string) => ({ cel, message: cel, holds: () => true });
    const schema = withRules(withRules(z.string().max(3), [rule("one")]), [{ ...rule("two"), at: "x" }]);
    expect(toStructural(schema)[VALIDATIONS]).toEqual([
      { rule: "one", message: "one" },
      { rule: "two", message: "two", fieldPath: ".x" },
    ]);
  });

  test.each([
    ["a union of objects", z.union([z.object({ a: z.string() }), z.object({ b: z.string() })]), "is a union"],
    ["a union of three", z.union([z.int(), z.string(), z.boolean()]), "is a union"],
    ["anything", z.object({ a: z.unknown().optional() }), "schema.a has no type"],
    ["two patterns", z.string().regex(/^a/).regex(/b$/), "allOf"],
    ["a list without list type", z.object({ list: z.array(z.string()) }), "schema.list has no list type"],
    ["a format that is not checked", z.email(), "has format email"],
    ["a tuple", z.tuple([z.string()]), "schema"],
  ])("%s is refused with its path", (_, schema, message) => {
    expect(() => toStructural(schema)).toThrow(message);
  });
});

describe("every definition", () => {
  test("T1: every node has a type or is an int-or-string", () => {
    const untyped = allNodes.filter(({ node }) => !node.type && node["x-kubernetes-int-or-string"] !== true);
    expect(untyped.map(({ path }) => path)).toEqual([]);
    expect(allNodes.length).toBeGreaterThan(200);
  });

  test("T2: no keyword that an API server refuses", () => {
    const forbidden = ["$schema", "$ref", "anyOf", "oneOf", "allOf", "not", "const", "propertyNames", "definitions"];
    const wrong = allNodes.filter(({ node }) => forbidden.some((keyword) => keyword in node));
    expect(wrong.map(({ path }) => path)).toEqual([]);
    expect(allNodes.filter(({ node }) => typeof node.additionalProperties === "boolean")).toEqual([]);
  });

  test("T3: every list, map and text of a spec has a bound, so that rules have a price", () => {
    const bounds: Record<string, string> = { array: "maxItems", object: "maxProperties", string: "maxLength" };
    const unbounded = allNodes.filter(({ path, node }) => {
      const bound = bounds[String(node.type)];
      if (bound === undefined || !/\.(spec|status)\./.test(path) || bound in node) return false;
      return node.properties === undefined && node.enum === undefined && node.format !== "date-time";
    });
    expect(unbounded.map(({ path }) => path)).toEqual([]);
  });

  test("a list by key has that key in every entry", () => {
    for (const { path, node } of allNodes) {
      if (node["x-kubernetes-list-type"] !== "map") continue;
      const keys = node["x-kubernetes-list-map-keys"];
      expect([path, at(node, "items", "required")]).toEqual([
        path,
        expect.arrayContaining(Array.isArray(keys) ? keys : [""]),
      ]);
    }
  });

  test("rules say what to write, on one line, and point at a field that is there", () => {
    for (const { path, node } of allNodes) {
      const rules = node[VALIDATIONS];
      for (const rule of Array.isArray(rules) ? rules : []) {
        const [message, place] = [String(at(rule, "message")), at(rule, "fieldPath")];
        expect(message, path).toMatch(/^[^\n]{20,400}$/);
        if (typeof place !== "string") continue;
        const keys = place
          .slice(1)
          .split(".")
          .flatMap((key) => ["properties", key]);
        expect(at(node, ...keys), `${path}${place}`).toBeDefined();
      }
    }
  });

  test("patterns are plain: no look-around and no back-reference, which RE2 has not", () => {
    const patterns = allNodes.flatMap(({ node }) => (typeof node.pattern === "string" ? [node.pattern] : []));
    expect(patterns.filter((pattern) => /\(\?[=!<]|\\[1-9]/.test(pattern))).toEqual([]);
  });
});

describe("the definitions on disk", () => {
  test("are what the code writes: run `npm run crds`", () => {
    const files = crdFiles();
    expect(readdirSync(CRDS_FOLDER).sort()).toEqual(files.map(({ path }) => basename(path)).sort());
    for (const { path, text } of files) expect(readFileSync(path, "utf8")).toBe(text);
  });

  test("are the definitions when they are read as YAML", () => {
    const written = crdFiles().map(({ text }) => parse(text));
    expect(written).toEqual(allCrds().map(({ crd }) => crd));
  });

  test("take less than 100 KB together", () => {
    const bytes = crdFiles().reduce((sum, { text }) => sum + Buffer.byteLength(text), 0);
    expect(bytes).toBeLessThan(100_000);
  });

  test("hold nothing that Helm takes for a template", () => {
    for (const { text } of crdFiles()) expect(text).not.toContain("{{");
  });

  test("stay when the chart goes", () => {
    for (const { crd } of allCrds()) expect(at(crd, "metadata", "annotations", "helm.sh/resource-policy")).toBe("keep");
  });

  test("have names, subresources and columns as users know them", () => {
    const mdep = crdOf("ModelDeployment");
    expect(at(mdep, "metadata", "name")).toBe(`modeldeployments.${GROUP}`);
    expect(at(mdep, "spec", "names", "shortNames")).toEqual(["mdep"]);
    const columns = at(mdep, "spec", "versions", 0, "additionalPrinterColumns");
    const shown = (Array.isArray(columns) ? columns : []).filter((column) => at(column, "priority") === undefined);
    expect(shown.map((column) => String(at(column, "name")).toUpperCase())).toEqual([
      "PLAN",
      "READY",
      "PHASE",
      "TOK/S",
      "ETA",
      "AGE",
    ]);
    for (const kind of ["ModelDeployment", "DraftPool"] as const)
      expect(at(crdOf(kind), "spec", "versions", 0, "subresources")).toEqual({
        status: {},
        scale: {
          specReplicasPath: ".spec.replicas",
          statusReplicasPath: ".status.replicas",
          labelSelectorPath: ".status.selector",
        },
      });
  });

  test("every path of a column or of scale is a field of the schema", () => {
    for (const kind of KINDS) {
      const version = at(crdOf(kind), "spec", "versions", 0);
      const columns = at(version, "additionalPrinterColumns");
      const paths = (Array.isArray(columns) ? columns : []).map((column) => String(at(column, "jsonPath")));
      const scale = at(version, "subresources", "scale");
      if (isSchema(scale)) paths.push(...Object.values(scale).map(String));
      for (const path of paths.filter((one) => !one.startsWith(".metadata."))) {
        const keys = path
          .slice(1)
          .split(".")
          .flatMap((key) => ["properties", key]);
        expect(at(schemaOf(kind), ...keys), `${NAMES[kind].plural} ${path}`).toBeDefined();
      }
    }
  });
});
