// From events to views: whose replicas are whose, what a name means, since when a model is down and whether it wakes.
import { expect, test } from "vitest";
import type { Feed } from "../../../controller/gateway/feed.ts";
import { isHopeless, ModelsView, type ModelView, viewOf, waitingText } from "../../../controller/gateway/watch.ts";
import { Phase, type ServedModel, type WatchEvent } from "../../../proto/gen/muster/v1/control.ts";
import { servedModel } from "./bed.ts";

const SERVING = { phase: Phase.SERVING, leaderAddress: "10.0.0.1:7440", incarnation: 1n, cause: "" };
const entry = (changes: Partial<ServedModel>): ServedModel =>
  servedModel(undefined, { name: "chat", namespace: "a", deployment: "chat", aliases: ["a/chat"], ...changes });
const event = (...models: ServedModel[]): WatchEvent => ({ version: 1n, models, drafts: [] });
const NONE = new Map<string, ModelView>();

/** The only model after these events, a second apart. */
function after(...events: WatchEvent[]): ModelView {
  let views: ReadonlyMap<string, ModelView> = NONE;
  for (const [index, one] of events.entries()) views = viewOf(one, views, index * 1000);
  const [view] = views.values();
  if (view === undefined) throw new Error("no model");
  return view;
}

test("W3: entries of one name and namespace are replicas; the first that takes requests speaks for the model", () => {
  const view = after(
    event(
      entry({ replica: "chat-g0", draining: true, ...SERVING }),
      entry({ replica: "chat-g1", phase: Phase.LOADING }),
      entry({ replica: "chat-g2", ...SERVING, revision: "r2" }),
    ),
  );
  expect(view.key).toBe("a/chat");
  expect(view.replicas.map(({ name, leader }) => [name, leader !== undefined])).toEqual([
    ["chat-g0", true],
    ["chat-g1", false],
    ["chat-g2", true],
  ]);
  expect(view.served.replica).toBe("chat-g2");
  expect(view.downSince).toBeUndefined();
});

test("W3: a name of two namespaces means neither; with its namespace it does", async () => {
  const told = event(entry({}), entry({ namespace: "b", aliases: ["b/chat"] }), entry({ name: "other", aliases: [] }));
  const feed: Feed = { source: "test", trouble: undefined, run: async (tell) => tell(told) };
  const view = new ModelsView(feed);
  await view.run(new AbortController().signal);
  const keysOf = (name: string) => {
    const found = view.find(name);
    return found && ("view" in found ? found.view.key : found.among.map(({ key }) => key));
  };
  expect(keysOf("chat")).toEqual(["a/chat", "b/chat"]);
  expect(keysOf("a/chat")).toBe("a/chat");
  expect(keysOf("b/chat")).toBe("b/chat");
  expect(keysOf("other")).toBe("a/other");
  expect(keysOf("nobody")).toBeUndefined();
  expect(view.models().map(({ title }) => title)).toEqual(["a/chat", "b/chat", "other"]);
});

test("W2: down counts from the first event without a replica that takes requests, and draining ones take none", () => {
  const draining = event(entry({ replica: "g0", draining: true, ...SERVING }));
  expect(after(event(entry({ replica: "g0", ...SERVING })), draining, draining).downSince).toBe(1000);
});

test("a deployment wakes from zero until it serves; what dies after that is down, not waking", () => {
  const asleep = event(entry({ phase: Phase.STOPPED, cause: "asleep" }));
  const loading = event(entry({ replica: "g0", phase: Phase.LOADING }));
  const serving = event(entry({ replica: "g0", ...SERVING }));
  expect(after(asleep).wakes).toBe(true);
  expect(after(asleep, loading).wakes).toBe(true);
  expect(after(loading).wakes).toBe(true);
  expect(after(asleep, serving).wakes).toBe(false);
  expect(after(asleep, serving, loading).wakes).toBe(false);
  expect(after(serving, event(entry({ replica: "g0", draining: true })), loading).wakes).toBe(true);
  expect(after(serving, loading, asleep).wakes).toBe(true);
  expect(after(event(entry({ deployment: "", phase: Phase.LOADING }))).wakes).toBe(false);
});

test("waiting helps where somebody is told of the demand, not where a person has said no, or nothing fits", () => {
  expect(isHopeless(entry({ phase: Phase.STOPPED }))).toBe(false);
  expect(isHopeless(entry({ phase: Phase.STOPPED, deployment: "" }))).toBe(true);
  expect(isHopeless(entry({ phase: Phase.INFEASIBLE }))).toBe(true);
  const mixed = after(
    event(entry({ replica: "g0", phase: Phase.INFEASIBLE }), entry({ replica: "g1", phase: Phase.PULLING })),
  );
  expect(isHopeless(mixed.served)).toBe(false);
  expect(waitingText(mixed)).toBe("pulling: waiting for rank 1");
  expect(waitingText(after(event(entry({ replica: "g0", ...SERVING }))))).toBe("");
});
