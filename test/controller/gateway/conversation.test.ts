import { expect, test } from "vitest";
import { stickyOf } from "../../../controller/gateway/conversation.ts";
import type { Input } from "../../../controller/gateway/requests.ts";

const chat = (...turns: [role: string, content: string][]): Input => ({
  $case: "chat",
  value: { messages: turns.map(([role, content]) => ({ role, content, name: "" })) },
});
const text = (value: string): Input => ({ $case: "text", value });

test("the turns of one chat are one conversation; another first question is another, whatever the system prompt", () => {
  const first = chat(["system", "be brief"], ["user", "hello"]);
  const later = chat(["system", "be brief"], ["user", "hello"], ["assistant", "hi"], ["user", "and then?"]);
  const other = chat(["system", "be brief"], ["user", "good morning"]);
  expect(stickyOf("", later)).toBe(stickyOf("", first));
  expect(stickyOf("", other)).not.toBe(stickyOf("", first));
});

test("texts and ids go by how they begin", () => {
  const long = "x".repeat(2_000);
  expect(stickyOf("", text(`${long} one`))).toBe(stickyOf("", text(`${long} two`)));
  expect(stickyOf("", text("one"))).not.toBe(stickyOf("", text("two")));
  const ids = (...more: number[]): Input => ({ $case: "prompt", value: { ids: [...Array(256).fill(7), ...more] } });
  expect(stickyOf("", ids(1))).toBe(stickyOf("", ids(2)));
});

test("the client's own key goes before the text", () => {
  expect(stickyOf("k", text("one"))).toBe(stickyOf("k", text("two")));
  expect(stickyOf("k", text("one"))).not.toBe(stickyOf("l", text("one")));
});
