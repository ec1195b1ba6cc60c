import { describe, expect, test } from "vitest";
import type { Chunk, Finish } from "../../../proto/gen/muster/v1/worker.ts";
import { Outlet } from "../../../worker/serve/outlet.ts";
import { chunkOf } from "../../../worker/serve/sequence.ts";
import { until } from "../../until.ts";

const opened = { prompt: [1], revision: "r", numericsId: "n" };
const finish: Finish = {
  reason: 2,
  fault: undefined,
  drafted: 0,
  accepted: 0,
  targetSteps: 3,
  stop: "",
  numericsChanged: false,
};
const token = (id: number, token: number): Chunk => chunkOf(id, { tokens: [token], text: `${token} ` });

function opening(paceMs: number) {
  const sent: Chunk[][] = [];
  const outlet = new Outlet(({ chunks }) => sent.push(chunks), paceMs);
  return { outlet, sent };
}

describe("one gateway stream", () => {
  test("O1: what several steps brought an id is one chunk; an id that comes again has its own", () => {
    const { outlet, sent } = opening(0);
    outlet.push(chunkOf(1, { opened }));
    outlet.push(token(1, 5));
    outlet.push(token(2, 7));
    outlet.push(chunkOf(1, { tokens: [6], text: "6", finish }));
    outlet.push(chunkOf(1, { opened, text: "again" }));
    outlet.push(token(1, 9));
    outlet.push(chunkOf(1, { finish }));
    outlet.push(chunkOf(1, { finish }));
    outlet.flush();
    expect(sent).toEqual([
      [
        chunkOf(1, { opened, tokens: [5, 6], text: "5 6", finish }),
        token(2, 7),
        chunkOf(1, { opened, tokens: [9], text: "again9 ", finish }),
        chunkOf(1, { finish }),
      ],
    ]);
  });

  test("O2: without a pace every flush is a message", () => {
    const { outlet, sent } = opening(0);
    for (const id of [1, 2, 3]) {
      outlet.push(token(7, id));
      outlet.flush();
    }
    expect(sent.length).toBe(3);
  });

  test("O2: tokens wait for their pace, and come without another flush", async () => {
    const { outlet, sent } = opening(40);
    for (const id of [1, 2, 3]) {
      outlet.push(token(7, id));
      outlet.flush();
    }
    expect(sent).toEqual([[token(7, 1)]]);
    expect(outlet.isQuiet).toBe(false);
    await until(() => sent.length === 2, "the second message");
    expect(sent[1]).toEqual([chunkOf(7, { tokens: [2, 3], text: "2 3 " })]);
    expect(outlet.isQuiet).toBe(true);
  });

  test("O2: a beginning or an end takes what waits with it at once", () => {
    const { outlet, sent } = opening(60_000);
    for (const chunk of [token(7, 1), token(7, 2), chunkOf(8, { opened }), token(8, 3), chunkOf(7, { finish })]) {
      outlet.push(chunk);
      outlet.flush();
    }
    expect(sent).toEqual([[token(7, 1)], [token(7, 2), chunkOf(8, { opened })], [token(8, 3), chunkOf(7, { finish })]]);
  });

  test("a closed stream sends nothing, also not what waited", () => {
    const { outlet, sent } = opening(60_000);
    outlet.push(token(7, 1));
    outlet.flush();
    outlet.push(token(7, 2));
    outlet.flush();
    outlet.close();
    outlet.push(chunkOf(7, { finish }));
    outlet.flush();
    expect(sent.length).toBe(1);
    expect(outlet.isQuiet).toBe(true);
  });
});
