// Renders a conversation with the model's own Jinja template. Owns the template's variables and turns its complaints into
// faults; does not own tokenising (special tokens are in the rendered text, nothing is added to it).
import { Template } from "@huggingface/jinja";
import { FaultError, invalid } from "../../proto/fault.ts";
import type { TokenizerSpec } from "../../proto/gen/muster/v1/plan.ts";
import type { Message } from "../../proto/gen/muster/v1/worker.ts";

/** Longest rendered chat in UTF-16 units: far above any context window, far below what would hurt. */
export const CHAT_CHARS_MAX = 1 << 23;

const reason = (cause: unknown): string => (cause instanceof Error ? cause.message : String(cause));

export class ChatTemplate {
  readonly #template: Template | undefined;
  readonly #bos: string;
  readonly #eos: string;

  /** Throws FaultError where the model's template cannot be parsed. */
  constructor(spec: TokenizerSpec) {
    this.#bos = spec.bosToken;
    this.#eos = spec.eosToken;
    if (spec.chatTemplate === "") return;
    try {
      this.#template = new Template(spec.chatTemplate);
    } catch (cause) {
      throw new FaultError(invalid("chat_template", `the model's chat template cannot be parsed: ${reason(cause)}`), {
        cause,
      });
    }
  }

  get isPresent(): boolean {
    return this.#template !== undefined;
  }

  /** Throws FaultError (invalid): no template, no messages, or what the template itself refuses. */
  render(messages: readonly Message[]): string {
    if (this.#template === undefined) {
      throw new FaultError(
        invalid(
          "messages",
          "this model has no chat template; send text to the completions endpoint instead",
          "no_chat_template",
        ),
      );
    }
    if (messages.length === 0) throw new FaultError(invalid("messages", "at least one message is needed"));
    let text: string;
    try {
      // raise_exception and strftime_now come with the renderer.
      text = this.#template.render({
        messages: messages.map(({ role, content, name }) => (name ? { role, content, name } : { role, content })),
        bos_token: this.#bos,
        eos_token: this.#eos,
        add_generation_prompt: true,
      });
    } catch (cause) {
      throw new FaultError(invalid("messages", `the model's chat template refused them: ${reason(cause)}`), { cause });
    }
    if (text.length > CHAT_CHARS_MAX)
      throw new FaultError(
        invalid("messages", `the rendered chat has ${text.length} characters; ${CHAT_CHARS_MAX} are allowed`),
      );
    return text;
  }
}
