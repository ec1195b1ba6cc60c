// Fields of a structural schema by path, for tests that say something of every one of them.
import type { JsonSchema } from "../../../controller/api/structural.ts";

export type SchemaNode = { path: string; node: JsonSchema };

const isSchema = (value: unknown): value is JsonSchema =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Every node, the root included; `[]` stands for an entry of a list, `{}` for a value of a map. */
export function schemaNodes(node: JsonSchema, path = ""): SchemaNode[] {
  const fields = isSchema(node.properties) ? Object.entries(node.properties) : [];
  const children: [string, unknown][] = [
    ...fields.map(([name, child]): [string, unknown] => [path === "" ? name : `${path}.${name}`, child]),
    [`${path}[]`, node.items],
    [`${path}{}`, node.additionalProperties],
  ];
  return [
    { path, node },
    ...children.flatMap(([childPath, child]) => (isSchema(child) ? schemaNodes(child, childPath) : [])),
  ];
}

/** Fields that hold a value: no objects with fields of their own; a map or a list of values is one field. */
export function fieldPaths(node: JsonSchema): string[] {
  return schemaNodes(node)
    .filter(({ path, node: field }) => path !== "" && !/[\]}]$/.test(path) && !isSchema(field.properties))
    .filter(({ node: field }) => !(isSchema(field.items) && isSchema(field.items.properties)))
    .map(({ path }) => path);
}

/** The values at a path, none where it is not set. */
export function valuesAt(value: unknown, path: string): unknown[] {
  return path.split(/\.|(?=\[\])/).reduce<unknown[]>(
    (all, key) =>
      all.flatMap((one) => {
        if (key === "[]") return Array.isArray(one) ? one : [];
        return isSchema(one) && one[key] !== undefined ? [one[key]] : [];
      }),
    [value],
  );
}
