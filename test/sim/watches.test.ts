import { describe, expect, test } from "vitest";
import { isGone, type WatchLine } from "../../controller/kube/api/client.ts";
import { nodes, pods } from "../../controller/kube/api/resources.ts";
import { begin, failureOf, NS, podOf, signal } from "./beds.ts";

async function collect(lines: AsyncIterable<WatchLine>, into: string[]): Promise<void> {
  for await (const line of lines) {
    if (line.type === "BOOKMARK") into.push(`BOOKMARK ${line.resourceVersion}`);
    else if (line.type === "ERROR") into.push(`ERROR ${line.error.code}`);
    else into.push(`${line.type} ${line.object.metadata.name}`);
  }
}

describe("lists and watches", () => {
  test("pages are of one moment, whatever happens between them; compaction makes the rest 410", async () => {
    const { server } = begin();
    for (const name of ["a", "b", "c", "d", "e"]) await server.create(pods, podOf(name), signal);
    const first = await server.list(pods, { limit: 2 }, signal);
    await server.delete(pods, "c", NS, {}, signal);
    await server.create(pods, podOf("cc"), signal);
    const second = await server.list(pods, { limit: 2, continue: first.continue }, signal);
    expect([...first.items, ...second.items].map(({ metadata }) => metadata.name)).toEqual(["a", "b", "c", "d"]);
    expect(second.resourceVersion).toBe(first.resourceVersion);
    server.compact();
    expect(isGone(await failureOf(server.list(pods, { limit: 2, continue: second.continue }, signal)))).toBe(true);
  });

  test("R1: from a version on there is every change once; before the compacted one it is 410", async () => {
    const { server, time } = begin();
    const { resourceVersion } = await server.list(pods, {}, signal);
    await server.create(pods, podOf("a"), signal);
    const lines: string[] = [];
    const ended = collect(server.watch(pods, { resourceVersion, timeoutSeconds: 30 }, signal), lines);
    await time.runFor(1);
    await server.patch(pods, "a", NS, { metadata: { labels: { x: "1" } } }, { type: "merge" }, signal);
    await server.delete(pods, "a", NS, {}, signal);
    await server.create(nodes, { apiVersion: "v1", kind: "Node", metadata: { name: "n" } }, signal);
    await time.finish(ended);
    expect(lines).toEqual(["ADDED a", "MODIFIED a", "DELETED a", `BOOKMARK ${server.version}`]);
    server.compact();
    const late: string[] = [];
    await time.finish(collect(server.watch(pods, { resourceVersion, timeoutSeconds: 30 }, signal), late));
    expect(late).toEqual(["ERROR 410"]);
  });

  test("R2: entering and leaving a selection is ADDED and DELETED", async () => {
    const { server, time } = begin();
    const lines: string[] = [];
    const selection = { labelSelector: "app=x,tier in (a, b),!old", fieldSelector: "status.phase!=Failed" };
    const ended = collect(server.watch(pods, { ...selection, resourceVersion: "", timeoutSeconds: 30 }, signal), lines);
    const label = (labels: unknown) => server.patch(pods, "a", NS, { metadata: { labels } }, { type: "merge" }, signal);
    await time.runFor(1);
    await server.create(pods, podOf("a"), signal);
    await label({ app: "x", tier: "b" });
    await label({ more: "1" });
    await label({ old: "1" });
    await time.finish(ended);
    expect(lines.slice(0, -1)).toEqual(["ADDED a", "MODIFIED a", "DELETED a"]);
  });

  test("R3: quiet streams have bookmarks; a break is an error, an abort its reason", async () => {
    const { server, time } = begin({ bookmarkEveryMs: 5_000 });
    const lines: string[] = [];
    const watch = { resourceVersion: server.version, timeoutSeconds: 300 };
    const broken = collect(server.watch(pods, watch, signal), lines);
    await time.runFor(11_000);
    server.dropWatches();
    expect((await failureOf(broken)).code).toBe(0);
    expect(lines).toEqual([`BOOKMARK ${server.version}`, `BOOKMARK ${server.version}`]);
    const stop = new AbortController();
    const aborted = collect(server.watch(pods, watch, stop.signal), lines);
    await time.runFor(1);
    stop.abort(new Error("enough"));
    await expect(aborted).rejects.toThrow("enough");
    expect(server.watchCount).toBe(0);
  });
});
