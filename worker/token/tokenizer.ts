// Text to ids, chats to ids, and the token table that turns ids back into text. Owns the npm `tokenizers` object.
import { readFile } from "node:fs/promises";
import { Tokenizer as Library } from "tokenizers";
import { FaultError, invalid } from "../../proto/fault.ts";
import type { TokenizerSpec } from "../../proto/gen/muster/v1/plan.ts";
import type { Message } from "../../proto/gen/muster/v1/worker.ts";
import { ChatTemplate } from "./chat-template.ts";
import { Detokenizer, TokenTexts } from "./detokenizer.ts";
import { parseVocabulary, type Vocabulary } from "./vocabulary.ts";

/** Longest text in UTF-16 units: 8 Mi characters are more tokens than any context holds. */
export const TEXT_CHARS_MAX = 1 << 23;

export class Tokenizer {
  readonly texts: TokenTexts;
  readonly template: ChatTemplate;
  readonly #library: Library;
  readonly #bosId: number | undefined;

  private constructor(library: Library, texts: TokenTexts, spec: TokenizerSpec) {
    this.#library = library;
    this.texts = texts;
    this.template = new ChatTemplate(spec);
    this.#bosId = spec.addBos ? (library.tokenToId(spec.bosToken) ?? undefined) : undefined;
  }

  /** Reads spec.jsonPath. Throws FaultError naming the file. */
  static async load(spec: TokenizerSpec): Promise<Tokenizer> {
    let json: string;
    try {
      json = await readFile(spec.jsonPath, "utf8");
    } catch (cause) {
      throw new FaultError(invalid("tokenizer.json_path", `${spec.jsonPath} cannot be read`), { cause });
    }
    const vocabulary = parseVocabulary(json, spec.jsonPath);
    let library: Library;
    try {
      library = Library.fromString(json);
    } catch (cause) {
      const detail = cause instanceof Error ? cause.message : String(cause);
      throw new FaultError(invalid("tokenizer.json_path", `${spec.jsonPath}: ${detail}`), { cause });
    }
    checkAdded(library, vocabulary, spec.jsonPath);
    return new Tokenizer(library, new TokenTexts(vocabulary), spec);
  }

  /** Ids of a plain text, with the tokenizer's special tokens (and bos where the model wants it and the file forgot it). */
  async encode(text: string): Promise<number[]> {
    const ids = await this.#ids(text, true);
    if (this.#bosId !== undefined && ids[0] !== this.#bosId) ids.unshift(this.#bosId);
    return ids;
  }

  /** Ids of a conversation: the template writes its own special tokens, none is added. */
  async encodeChat(messages: readonly Message[]): Promise<number[]> {
    return this.#ids(this.template.render(messages), false);
  }

  detokenizer(): Detokenizer {
    return new Detokenizer(this.texts);
  }

  async #ids(text: string, addSpecialTokens: boolean): Promise<number[]> {
    if (text.length > TEXT_CHARS_MAX) {
      throw new FaultError(
        invalid(
          "prompt",
          `the text has ${text.length} characters; ${TEXT_CHARS_MAX} are allowed`,
          "context_length_exceeded",
        ),
      );
    }
    const encoding = await this.#library.encode(text, null, { addSpecialTokens });
    return encoding.getIds();
  }
}

// The library renumbers added tokens that its table does not hold: every prompt would be wrong, and nothing would say so.
function checkAdded(library: Library, { added }: Vocabulary, where: string): void {
  for (const [id, content] of added) {
    const found = library.tokenToId(content);
    if (found === id) continue;
    const detail = `"${content}" has id ${id} in the file and ${found ?? "none"} in the tokenizer made of it`;
    throw new FaultError(invalid(`${where}: added_tokens`, detail));
  }
}
