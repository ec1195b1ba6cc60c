import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  applyOwned,
  FIELD_MANAGER,
  ownerReferenceTo,
  patchSeen,
  pointerSegment,
} from "../../../../controller/kube/api/apply.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { configMaps, modelDeployments, pods } from "../../../../controller/kube/api/resources.ts";
import { isRecord } from "../../../../controller/kube/api/wire.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { realTime } from "../../../sim/virtual-time.ts";
import { clientOf, failureOf, mapOf, NS, serve } from "../beds.ts";

const { signal } = new AbortController();

const values = fc.letrec((tie) => ({
  value: fc.oneof({ depthSize: "small" }, fc.string(), fc.integer(), fc.boolean(), fc.array(fc.integer()), tie("map")),
  map: fc.dictionary(fc.constantFrom("default", "enum", "x-kubernetes-y", "a", "b", "c"), tie("value"), { maxKeys: 4 }),
})).map;

describe("apply", () => {
  test("Y1: what is wanted is what is there, once and again; what was left out has gone; what others added stays", async () => {
    await fc.assert(
      fc.asyncProperty(values, values, async (first, second) => {
        const server = new SimApiServer(new VirtualClock());
        const one = await applyOwned(server, configMaps, mapOf("c", { ...first, own: 1 }), { signal });
        const again = await applyOwned(server, configMaps, mapOf("c", { ...first, own: 1 }), { signal });
        expect(again).toEqual(one);
        expect(again.data).toEqual({ ...first, own: 1 });
        await server.patch(
          configMaps,
          "c",
          NS,
          { data: { theirs: "kept" } },
          { type: "merge", fieldManager: "kubectl" },
          signal,
        );
        const next = await applyOwned(server, configMaps, mapOf("c", { ...second, own: 1 }), { signal });
        expect(next.data).toEqual({ ...second, own: 1, theirs: "kept" });
      }),
      { numRuns: 200, seed: 5 },
    );
  });

  test("Y2: a field that somebody else has changed is taken back", async () => {
    const server = new SimApiServer(new VirtualClock());
    await applyOwned(server, configMaps, mapOf("c", { a: 1 }), { signal });
    await server.patch(configMaps, "c", NS, { data: { a: 2 } }, { type: "merge", fieldManager: "kubectl" }, signal);
    const back = await applyOwned(server, configMaps, mapOf("c", { a: 1 }), { signal });
    expect(back.data).toEqual({ a: 1 });
    expect(server.ownersOf(back).get(FIELD_MANAGER)?.size).toBeGreaterThan(0);
    expect((await applyOwned(server, configMaps, mapOf("c", { a: 9 }), { signal, dryRun: true })).data).toEqual({
      a: 9,
    });
    expect(server.objects(configMaps)[0]?.data).toEqual({ a: 1 });
  });

  test("over HTTP an apply keeps what a typed serializer drops", async () => {
    const server = await serve(new SimApiServer(realTime));
    const schema = { properties: { replicas: { default: 1, enum: [1, 2], "x-kubernetes-int-or-string": true } } };
    const applied = await applyOwned(clientOf(server.url), configMaps, mapOf("c", schema), { signal });
    expect(applied.data).toEqual(schema);
    expect(server.requests[0]).toMatchObject({
      method: "PATCH",
      headers: { "content-type": "application/apply-patch+yaml" },
    });
    expect(server.requests[0]?.url).toContain(`fieldManager=${FIELD_MANAGER}&force=true`);
  });
});

describe("patch as seen", () => {
  const gated: KubeObject = {
    apiVersion: "v1",
    kind: "Pod",
    metadata: { name: "p", namespace: NS, labels: { "muster.dev/group": "g" } },
    spec: { containers: [{ name: "w" }], schedulingGates: [{ name: "muster.dev/gang" }] },
  };
  const open = [
    { op: "remove", path: "/spec/schedulingGates" },
    { op: "add", path: "/spec/affinity", value: { nodeAffinity: {} } },
  ] as const;

  test("gate and affinity change together, and only on the pod as it was looked at", async () => {
    const server = new SimApiServer(new VirtualClock());
    const seen = await server.create(pods, gated, signal);
    const path = `/metadata/labels/${pointerSegment("muster.dev/group")}`;
    await patchSeen(server, pods, seen, { operations: [{ op: "test", path, value: "g" }], signal });
    await server.patch(pods, "p", NS, { metadata: { labels: { x: "1" } } }, { type: "merge" }, signal);
    expect((await failureOf(patchSeen(server, pods, seen, { operations: open, signal }))).code).toBe(409);
    const now = server.objects(pods)[0];
    expect(now?.spec).toEqual(gated.spec);
    if (now === undefined) throw new Error("the pod is there");
    const opened = await patchSeen(server, pods, now, { operations: open, signal });
    expect(opened.spec).toEqual({ containers: [{ name: "w" }], affinity: { nodeAffinity: {} } });
    expect(pointerSegment("a/b~c")).toBe("a~1b~0c");
    await expect(patchSeen(server, pods, gated, { operations: open, signal })).rejects.toThrow("was read");
  });
});

describe("owner references", () => {
  test("they tie what is made to its maker, and need one that is stored", async () => {
    const time = new VirtualClock();
    const server = new SimApiServer(time);
    const wanted = {
      apiVersion: "muster.dev/v1alpha1",
      kind: "ModelDeployment",
      metadata: { name: "m", namespace: NS },
    };
    const owner = await server.create(modelDeployments, wanted, signal);
    const map = mapOf("c");
    await applyOwned(
      server,
      configMaps,
      { ...map, metadata: { ...map.metadata, ownerReferences: [ownerReferenceTo(owner)] } },
      { signal },
    );
    expect(server.objects(configMaps)[0]?.metadata.ownerReferences).toEqual([
      {
        ...wanted,
        metadata: undefined,
        name: "m",
        uid: owner.metadata.uid,
        controller: true,
        blockOwnerDeletion: false,
      },
    ]);
    await server.delete(modelDeployments, "m", NS, {}, signal);
    await time.runFor(1_000);
    expect(server.objects(configMaps)).toEqual([]);
    expect(() => ownerReferenceTo(wanted)).toThrow("no uid");
    expect(isRecord(owner.metadata)).toBe(true);
  });
});
