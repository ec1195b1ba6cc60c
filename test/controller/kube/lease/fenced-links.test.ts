// A Load goes out while the term is held, and not after.
import { expect, test } from "vitest";
import { fencedLinks } from "../../../../controller/kube/lease/fenced-links.ts";
import type { WorkerLinks } from "../../../../controller/kube/workers/worker-link.ts";
import { LoadRequest } from "../../../../proto/gen/muster/v1/worker.ts";

test("who leads no more sends no Load, and may still look", async () => {
  let isHeld = true;
  const taken: string[] = [];
  const links: WorkerLinks = {
    describe: async () => ({ kind: "silent", detail: "nobody is there" }),
    load: async ({ uid }) => void taken.push(uid),
    forget: () => {},
  };
  const fenced = fencedLinks(links, { isHeld: () => isHeld });
  const target = { name: { group: "serving/a", incarnation: 1n, worker: 0 }, uid: "one", address: "10.0.0.1:7000" };
  const { signal } = new AbortController();
  await fenced.load(target, LoadRequest.create(), signal);
  isHeld = false;
  await expect(fenced.load(target, LoadRequest.create(), signal)).rejects.toThrow("does not lead any more");
  expect(taken).toEqual(["one"]);
  expect(await fenced.describe(target, signal)).toEqual({ kind: "silent", detail: "nobody is there" });
});
