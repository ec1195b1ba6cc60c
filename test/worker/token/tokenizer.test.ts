import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { ChatTemplate } from "../../../worker/token/chat-template.ts";
import { TEXT_CHARS_MAX, Tokenizer } from "../../../worker/token/tokenizer.ts";

const at = (path: string) => new URL(`../../models/${path}`, import.meta.url).pathname;
const template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}";
const spec = {
  jsonPath: at("nano-maverick/tokenizer.json"),
  chatTemplate: template,
  bosToken: "<|begin_of_text|>",
  eosToken: "<|end_of_text|>",
  addBos: true,
  vocabHash: 1n,
};
const golden: { greedy: { prompt: string; prompt_ids: number[]; greedy: number[]; text: string }[] } = JSON.parse(
  readFileSync(at("nano-maverick/golden.json"), "utf8"),
);
const user = (content: string) => ({ role: "user", content, name: "" });

describe("tokenizer", () => {
  test("gives the golden ids of the golden prompts, and their text for the golden answers", async () => {
    const tokenizer = await Tokenizer.load(spec);
    for (const { prompt, prompt_ids, greedy, text } of golden.greedy) {
      expect(await tokenizer.encode(prompt)).toEqual(prompt_ids);
      const detokenizer = tokenizer.detokenizer();
      expect(greedy.map((id) => detokenizer.push(id)).join("") + detokenizer.end()).toBe(text);
    }
  });

  test("adds no special tokens to a rendered chat: it brings its own", async () => {
    const tokenizer = await Tokenizer.load(spec);
    const ids = await tokenizer.encodeChat([user("Mr. Speaker"), user("We")]);
    expect(ids.filter((id) => id === 2042)).toEqual([2042]);
    // Jinja's trim_blocks, as everybody who trains with these templates has it: the newline after a block is not text.
    expect(ids).toEqual(await tokenizer.encode("Mr. SpeakerWe"));
    const bare = await Tokenizer.load({ ...spec, chatTemplate: "{{ messages[0].content }}" });
    expect(await bare.encodeChat([user("We")])).not.toContain(2042);
  });

  test("refuses a text beyond any context before it is tokenised", async () => {
    const tokenizer = await Tokenizer.load(spec);
    await expect(tokenizer.encode("a".repeat(TEXT_CHARS_MAX + 1))).rejects.toMatchObject({
      fault: { field: "prompt", code: "context_length_exceeded" },
    });
  });

  test("names the file that cannot be read", async () => {
    await expect(Tokenizer.load({ ...spec, jsonPath: "/nowhere/tokenizer.json" })).rejects.toThrow(
      "/nowhere/tokenizer.json",
    );
  });
});

describe("chat template", () => {
  test("knows bos, eos, the generation prompt, and the template's own refusals", () => {
    const text =
      "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be of the user') }}{% endif %}" +
      "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}|assistant|{% endif %}";
    const chat = new ChatTemplate({ ...spec, chatTemplate: text });
    expect(chat.render([user("hi")])).toBe("<|begin_of_text|>hi<|end_of_text|>|assistant|");
    expect(() => chat.render([{ role: "system", content: "x", name: "" }])).toThrow(
      "the first message must be of the user",
    );
    expect(() => chat.render([])).toThrow("at least one message");
  });

  test("has the date for templates that ask for it", () => {
    const chat = new ChatTemplate({ ...spec, chatTemplate: "{{ strftime_now('%Y') }}" });
    expect(chat.render([user("x")])).toMatch(/^20\d\d$/);
  });

  test("a model without one says so", () => {
    const chat = new ChatTemplate({ ...spec, chatTemplate: "" });
    expect(() => chat.render([user("x")])).toThrow("no chat template");
  });

  test("one that cannot be parsed is the model's fault, found at load", () => {
    expect(() => new ChatTemplate({ ...spec, chatTemplate: "{% for %}" })).toThrow("cannot be parsed");
  });
});

describe("added tokens", () => {
  test("a file whose added token the library would renumber is refused, by token and id", async () => {
    const root = JSON.parse(readFileSync(spec.jsonPath, "utf8"));
    root.added_tokens.push({ ...root.added_tokens[0], id: 5, content: "<|lost|>" });
    const jsonPath = join(mkdtempSync(join(tmpdir(), "tokenizer-")), "tokenizer.json");
    writeFileSync(jsonPath, JSON.stringify(root));
    await expect(Tokenizer.load({ ...spec, jsonPath })).rejects.toThrow(/<\|lost\|>.*id 5/);
  });
});
