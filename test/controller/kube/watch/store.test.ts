import { describe, expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";

function object(name: string, version: number, more: Partial<KubeObject["metadata"]> = {}): KubeObject {
  const metadata = { name, namespace: "x", uid: `uid-${name}`, resourceVersion: String(version), ...more };
  return { apiVersion: "v1", kind: "Pod", metadata };
}

function told(store: Store): string[] {
  const lines: string[] = [];
  store.subscribe((delta) => {
    const mark = delta.kind === "deleted" ? (delta.isFinal ? " final" : " unseen") : "";
    lines.push(`${delta.kind} ${delta.object.metadata.name}@${delta.object.metadata.resourceVersion}${mark}`);
  });
  return lines;
}

describe("store", () => {
  test("K1: an older version changes nothing, whether it comes from a watch, a list or a late answer", () => {
    const store = new Store();
    const lines = told(store);
    store.replace([object("a", 5)], "5");
    store.learn(object("a", 9));
    store.put(object("a", 7));
    store.learn(object("a", 8));
    store.replace([object("a", 8)], "8");
    store.put(object("a", 9));
    // Longer numbers are greater, whatever their first digit.
    store.put(object("a", 10));
    expect(lines).toEqual(["added a@5", "updated a@9", "updated a@10"]);
  });

  test("K1: what is gone is not brought back by late news, but comes back newer (it left a selection and returned)", () => {
    const store = new Store();
    const lines = told(store);
    store.put(object("a", 5));
    store.remove(object("a", 7));
    store.learn(object("a", 6));
    store.put(object("a", 7));
    expect(store.size).toBe(0);
    store.put(object("a", 8));
    expect(lines).toEqual(["added a@5", "deleted a@7 final", "added a@8"]);
  });

  test("K1: a list older than what was watched is a server that went back: it is believed whole", () => {
    const store = new Store();
    store.replace([object("a", 5), object("b", 6)], "6");
    store.put(object("a", 9));
    store.remove(object("c", 8));
    const lines = told(store);
    store.replace([object("a", 3), object("c", 4)], "7");
    expect(lines).toEqual(["deleted b@6 unseen", "updated a@3", "added c@4"]);
  });

  test("K1: a deletion that was announced before the newest answer is old news", () => {
    const store = new Store();
    store.learn(object("a", 9));
    store.remove(object("a", 7));
    expect(store.size).toBe(1);
  });

  test("one's own new object is not lost to a list that is older than it", () => {
    const store = new Store();
    store.learn(object("a", 9));
    store.replace([], "8");
    expect(store.size).toBe(1);
    store.replace([], "10");
    expect(store.size).toBe(0);
  });

  test("K3: what vanished between two lists is told with its last known state", () => {
    const store = new Store();
    store.replace([object("a", 1), object("b", 2)], "2");
    const lines = told(store);
    store.replace([object("b", 2)], "9");
    expect(lines).toEqual(["deleted a@1 unseen"]);
  });

  test("K4: a new object of an old name is told as two changes, in a list and in a watch", () => {
    const store = new Store();
    store.replace([object("a", 1), object("b", 2)], "2");
    const lines = told(store);
    store.replace([object("a", 5, { uid: "new" }), object("b", 2)], "5");
    store.put(object("b", 6, { uid: "other" }));
    // The deletion of the old one comes late.
    store.remove(object("b", 4));
    expect(lines).toEqual(["deleted a@1 unseen", "added a@5", "deleted b@2 unseen", "added b@6"]);
  });

  test("indexes follow every change of owner, label and namespace", () => {
    const store = new Store({ labels: ["app"] });
    const owner = { apiVersion: "v1", kind: "X", name: "o", uid: "owner" };
    store.put(object("a", 1, { ownerReferences: [owner], labels: { app: "one" } }));
    expect(store.ownedBy("owner")).toHaveLength(1);
    expect(store.labelled("app", "one")).toHaveLength(1);
    store.put(object("a", 2, { labels: { app: "two" } }));
    expect(store.ownedBy("owner")).toEqual([]);
    expect(store.labelled("app", "one")).toEqual([]);
    expect(store.labelled("app", "two")[0]).toBe(store.get("x/a"));
    store.remove(object("a", 3));
    expect(store.labelled("app", "two")).toEqual([]);
    expect(store.inNamespace("x")).toEqual([]);
    expect(() => store.labelled("zone", "z")).toThrow("no index for label zone");
  });

  test("what is kept of an object is chosen once; managed fields are never", () => {
    const store = new Store();
    const metadata = { ...object("a", 1).metadata, managedFields: [{ manager: "m" }] };
    store.put({ apiVersion: "v1", kind: "Pod", metadata });
    expect(store.get("x/a")?.metadata).toEqual(object("a", 1).metadata);
    const small = new Store({ keep: ({ apiVersion, kind, metadata }) => ({ apiVersion, kind, metadata }) });
    small.put({ ...object("a", 1), spec: { large: true } });
    expect(small.get("x/a")).toEqual(object("a", 1));
  });

  test("synced resolves with the first whole list and rejects with the reason of its signal", async () => {
    const store = new Store();
    const stop = new AbortController();
    const given = store.synced(stop.signal);
    stop.abort(new Error("enough"));
    await expect(given).rejects.toThrow("enough");
    const waiting = store.synced(new AbortController().signal);
    store.put(object("a", 1));
    expect(store.isSynced).toBe(false);
    store.replace([], "1");
    await waiting;
    expect(store.isSynced).toBe(true);
  });
});
