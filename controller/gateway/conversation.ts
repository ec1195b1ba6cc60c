// Which conversation a request belongs to, told by what does not change from turn to turn: the client's own key, or how its
// input begins. Pure; a digest of fixed length, so that nothing of a prompt is kept.
import { createHash } from "node:crypto";
import type { Input } from "./requests.ts";

/** Enough to tell prompts apart and little to hash: about what a few KV blocks hold. */
const PREFIX_UNITS = 1_024;
const PREFIX_IDS = 256;
const DIGEST_CHARS = 16;

/** Equal for the turns of one conversation. A system prompt is of many conversations: the first user's words count too. */
export function stickyOf(key: string, input: Input): string {
  const hash = createHash("sha256");
  hash.update(key === "" ? beginningOf(input) : `key\0${key}`);
  return hash.digest("hex").slice(0, DIGEST_CHARS);
}

function beginningOf(input: Input): string {
  switch (input.$case) {
    case "text":
      return `text\0${input.value.slice(0, PREFIX_UNITS)}`;
    case "prompt":
      return `ids\0${input.value.ids.slice(0, PREFIX_IDS).join(",")}`;
    default: {
      const { messages } = input.value;
      const first = messages.findIndex(({ role }) => role === "user");
      const opening = messages.slice(0, first < 0 ? 1 : first + 1);
      return `chat\0${opening.map(({ role, content }) => `${role}\0${content.slice(0, PREFIX_UNITS)}`).join("\0")}`;
    }
  }
}
