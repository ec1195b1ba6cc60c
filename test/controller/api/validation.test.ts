import { describe, expect, test } from "vitest";
import { crdOf } from "../../../controller/api/crd.ts";
import { draftPoolSpec } from "../../../controller/api/draft-pool.ts";
import { KINDS, type Kind } from "../../../controller/api/meta.ts";
import { modelDeploymentSpec } from "../../../controller/api/model-deployment.ts";
import {
  editFault,
  parseDraftPool,
  parseModelDeployment,
  parseReplicaGroup,
  parseShardPlan,
} from "../../../controller/api/parse.ts";
import { toStructural } from "../../../controller/api/structural.ts";
import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import { Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";
import { fieldPaths, schemaNodes, valuesAt } from "./leaves.ts";
import { type MatrixCase, matrix } from "./matrix.ts";
import { fullDeployment, fullPool, minimalDeployment } from "./objects.ts";
import { randomCases } from "./random-cases.ts";

const parsers: Record<Kind, (object: unknown) => { kind: "ok" } | { kind: "refused"; fault: Fault }> = {
  ModelDeployment: parseModelDeployment,
  DraftPool: parseDraftPool,
  ShardPlan: parseShardPlan,
  ReplicaGroup: parseReplicaGroup,
};

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null;
const field = (object: unknown, name: string) => (isRecord(object) ? object[name] : undefined);

function kindOf(object: unknown): Kind {
  const kind = KINDS.find((known) => known === field(object, "kind"));
  if (kind === undefined) throw new Error(`${JSON.stringify(object)} is of no kind`);
  return kind;
}

/** As an API server judges: the object first, then the edit. */
function judge({ object, before }: MatrixCase): Fault | undefined {
  const kind = kindOf(object);
  const parsed = parsers[kind](object);
  if (parsed.kind === "refused") return parsed.fault;
  return before === undefined ? undefined : editFault(kind, field(before, "spec"), field(object, "spec"));
}

const said = (fault: Fault | undefined) => fault && `${fault.field}: ${fault.detail}`;

describe("the validation matrix without a cluster", () => {
  test.each(matrix.filter((one) => one.accepted))("accepts $name", (one) => {
    expect(said(judge(one))).toBeUndefined();
  });

  test.each(matrix.filter((one) => !one.accepted))("refuses $name", (one) => {
    const fault = judge(one);
    expect(fault?.kind).toBe(Fault_Kind.INVALID);
    expect(one.messagePart).toBeTruthy();
    expect(said(fault)).toContain(one.messagePart);
  });

  test("names of cases are unique, and what is edited was valid before", () => {
    const names = matrix.map(({ name }) => name);
    expect(names.filter((name, index) => names.indexOf(name) !== index)).toEqual([]);
    for (const { before } of matrix) {
      if (before !== undefined) expect(parsers[kindOf(before)](before).kind).toBe("ok");
    }
  });
});

describe("the matrix leaves nothing out", () => {
  test("every rule of every kind refuses at least one case by its message", () => {
    const messages = KINDS.flatMap((kind) => {
      const spec = JSON.stringify(crdOf(kind));
      return [...spec.matchAll(/"message":("(?:[^"\\]|\\.)*")/g)].map((match) => String(JSON.parse(match[1] ?? '""')));
    });
    expect(messages.length).toBeGreaterThan(30);
    const parts = matrix.flatMap(({ messagePart }) => messagePart ?? []);
    const untested = [...new Set(messages)].filter((message) => !parts.some((part) => message.includes(part)));
    expect(untested).toEqual([]);
  });

  test.each([
    [
      "ModelDeployment",
      toStructural(modelDeploymentSpec),
      [fullDeployment(), minimalDeployment({ speculation: { method: "mtp" } })],
    ],
    ["DraftPool", toStructural(draftPoolSpec), [fullPool()]],
  ] as const)("every field of a %s is set in an accepted object", (_, schema, objects) => {
    const specs = objects.map(({ spec }) => spec);
    const unset = fieldPaths(schema).filter((path) => specs.every((spec) => valuesAt(spec, path).length === 0));
    expect(unset).toEqual([]);
  });

  test("every field of a ModelDeployment refuses a value of another type, by its path", () => {
    const accepted: string[] = [];
    for (const path of fieldPaths(toStructural(modelDeploymentSpec))) {
      const object = structuredClone(fullDeployment());
      const isSet = replaceAt(object.spec, path, [[]]);
      const parsed = parseModelDeployment(object);
      // speculation.method excludes draftPool and is left out of the full object; the matrix refuses a wrong one.
      if (!isSet && path === "speculation.method") continue;
      const place = `spec.${path}`.replaceAll("[]", "[0]");
      if (parsed.kind === "ok" || !parsed.fault.field.startsWith(place)) accepted.push(path);
    }
    expect(accepted).toEqual([]);
  });
});

/** Whether there was something to replace. */
function replaceAt(value: unknown, path: string, by: unknown): boolean {
  const keys = path.replaceAll("[]", ".0").split(".");
  const last = keys.pop() ?? "";
  const parent = keys.reduce<unknown>((one, key) => field(one, key), value);
  if (!isRecord(parent) || parent[last] === undefined) return false;
  parent[last] = by;
  return true;
}

describe("random objects", () => {
  test("are judged without a throw, and what is accepted parses to itself", () => {
    const cases = [1, 2, 3, 4].flatMap((seed) => randomCases(seed, 500));
    const accepted = cases.filter((one) => one.accepted);
    expect(accepted.length).toBeGreaterThan(200);
    expect(cases.length - accepted.length).toBeGreaterThan(200);
    for (const { name, object } of accepted) {
      const once = parsers[kindOf(object)](object);
      expect(parsers[kindOf(object)]("value" in once ? once.value : undefined), name).toEqual(once);
    }
  });
});

describe("parsing", () => {
  test("fills in what is left out", () => {
    const parsed = parseModelDeployment(minimalDeployment({}));
    expect(parsed.kind === "ok" ? parsed.value.spec : parsed.fault).toEqual({
      model: { source: "builtin://nano-maverick" },
      format: { container: "auto", quantisation: "auto" },
      replicas: 1,
      slo: { concurrency: 16 },
      kvCache: { dtype: "auto" },
      experts: { redundant: 0, balancing: "none" },
      speculation: { lossless: "L1" },
      rollout: { kind: "surge", drainTimeout: "5m" },
      priority: 0,
    });
  });

  test("defaults of the CRD are those of zod", () => {
    const filled = parseModelDeployment(minimalDeployment({}));
    const spec = filled.kind === "ok" ? filled.value.spec : undefined;
    for (const { path, node } of schemaNodes(toStructural(modelDeploymentSpec))) {
      if (node.default === undefined || isRecord(node.default) || valuesAt(spec, path).length === 0) continue;
      expect([path, ...valuesAt(spec, path)]).toEqual([path, node.default]);
    }
  });

  test("a parsed object parses to itself", () => {
    for (const object of [fullDeployment(), minimalDeployment({})]) {
      const once = parseModelDeployment(object);
      expect(parseModelDeployment(once.kind === "ok" ? once.value : undefined)).toEqual(once);
    }
  });

  test("metadata that is not ours passes through", () => {
    const managed = {
      ...minimalDeployment({}),
      metadata: { name: "a", uid: "u", managedFields: [{ manager: "kubectl" }] },
    };
    const parsed = parseModelDeployment(managed);
    expect(parsed.kind === "ok" && parsed.value.metadata).toEqual(managed.metadata);
  });

  test("a status of a newer controller is read without what is not known here", () => {
    const parsed = parseModelDeployment({ ...minimalDeployment({}), status: { phase: "Serving", mood: "good" } });
    expect(parsed.kind === "ok" && parsed.value.status).toEqual({ phase: "Serving" });
  });

  test.each([undefined, null, 3, "text", [], {}, { kind: "ModelDeployment" }])(
    "%j is refused, not thrown",
    (object) => {
      for (const kind of KINDS) expect(parsers[kind](object).kind).toBe("refused");
    },
  );

  test("of several faults the first is named and the others are counted", () => {
    const parsed = parseModelDeployment(minimalDeployment({ replicas: -1, priority: 5000 }));
    expect(parsed.kind === "refused" && said(parsed.fault)).toBe("spec.replicas: write at least 0 (and 1 more)");
  });
});
