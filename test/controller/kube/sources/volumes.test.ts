// Claims and their volumes: which nodes reach one, and who may mount it.
import { describe, expect, test } from "vitest";
import { persistentVolumeClaims, persistentVolumes } from "../../../../controller/kube/api/resources.ts";
import {
  isReachable,
  modeFault,
  type NodeTerm,
  readClaim,
  termsText,
} from "../../../../controller/kube/sources/volumes.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";

const { signal: never } = new AbortController();
const term = (key: string, operator: string, ...values: string[]): NodeTerm => ({
  labels: [{ key, operator, values }],
  fields: [],
});
const node = (labels: Record<string, string>, name = "gpu-a") => ({ name, labels });

describe("node affinity, as the scheduler has it", () => {
  test.each<[string, NodeTerm[], Record<string, string>, boolean]>([
    ["no terms", [], {}, true],
    ["In holds", [term("zone", "In", "x", "y")], { zone: "y" }, true],
    ["In does not", [term("zone", "In", "x")], { zone: "y" }, false],
    ["In without the label", [term("zone", "In", "x")], {}, false],
    ["NotIn without the label", [term("zone", "NotIn", "x")], {}, true],
    ["NotIn does not", [term("zone", "NotIn", "x")], { zone: "x" }, false],
    ["Exists", [term("zone", "Exists")], { zone: "" }, true],
    ["DoesNotExist", [term("zone", "DoesNotExist")], { zone: "" }, false],
    ["Gt", [term("n", "Gt", "3")], { n: "4" }, true],
    ["Gt is strict", [term("n", "Gt", "4")], { n: "4" }, false],
    ["Lt of no number", [term("n", "Lt", "4")], { n: "x" }, false],
    ["one of two terms", [term("zone", "In", "x"), term("zone", "In", "y")], { zone: "y" }, true],
    ["an empty term is none", [{ labels: [], fields: [] }], { zone: "y" }, false],
    ["an operator that nobody knows", [term("zone", "Near", "x")], { zone: "x" }, false],
  ])("%s", (_, terms, labels, expected) => {
    expect(isReachable(terms, node(labels))).toBe(expected);
  });

  test("all requirements of a term, and the node's name", () => {
    const both: NodeTerm = {
      labels: [{ key: "zone", operator: "In", values: ["x"] }],
      fields: [{ key: "metadata.name", operator: "In", values: ["gpu-a"] }],
    };
    expect(isReachable([both], node({ zone: "x" }))).toBe(true);
    expect(isReachable([both], node({ zone: "x" }, "gpu-b"))).toBe(false);
    expect(termsText([both])).toBe("zone In [x] and metadata.name In [gpu-a]");
  });
});

test("a claim is read with its volume's nodes and modes", async () => {
  const api = new SimApiServer(new VirtualClock());
  const where = { namespace: "serving", claim: "weights" };
  expect(await readClaim(api, where, never)).toEqual({ kind: "missing" });
  const claim = {
    apiVersion: "v1",
    kind: "PersistentVolumeClaim",
    metadata: { name: "weights", namespace: "serving" },
    spec: { accessModes: ["ReadOnlyMany"] },
  };
  const made = await api.create(persistentVolumeClaims, claim, never);
  expect(await readClaim(api, where, never)).toEqual({ kind: "unbound", modes: ["ReadOnlyMany"] });
  const spec = { accessModes: ["ReadOnlyMany"], volumeName: "pv-1" };
  await api.replace(persistentVolumeClaims, { ...made, spec }, never);
  const required = { nodeSelectorTerms: [{ matchExpressions: [{ key: "zone", operator: "In", values: ["x"] }] }] };
  const volume = {
    apiVersion: "v1",
    kind: "PersistentVolume",
    metadata: { name: "pv-1" },
    spec: { nodeAffinity: { required } },
  };
  await api.create(persistentVolumes, volume, never);
  const terms = [term("zone", "In", "x")];
  expect(await readClaim(api, where, never)).toEqual({ kind: "bound", volume: "pv-1", modes: ["ReadOnlyMany"], terms });
});

describe("access modes", () => {
  const bound = (...modes: string[]) => ({ kind: "bound" as const, volume: "v", modes, terms: [] });
  test.each<[string, string[], number, number, RegExp | undefined]>([
    ["one worker may have any", ["ReadWriteOncePod"], 1, 1, undefined],
    ["two workers, one pod at a time", ["ReadWriteOncePod"], 2, 1, /one pod at a time.*2 workers/],
    ["two replicas, one node at a time", ["ReadWriteOnce"], 1, 2, /one node at a time.*2 replicas/],
    ["two workers, many nodes", ["ReadWriteOnce", "ReadOnlyMany"], 2, 2, undefined],
  ])("%s", (_, modes, workers, replicas, message) => {
    const fault = modeFault(bound(...modes), "weights", { workers, replicas });
    if (message === undefined) expect(fault).toBeUndefined();
    else expect(fault).toMatch(message);
  });
});
