// A vocabulary's name in the API: TokenizerSpec.vocab_hash, 64 bits, as 16 hex digits (JSON numbers cannot hold it).
import { z } from "zod";
import { withRules } from "./rules.ts";

const VOCABULARY = "^[0-9a-f]{16}$";
const isVocabulary = new RegExp(VOCABULARY);

export const vocabulary = withRules(z.string().max(16), [
  {
    cel: `self.matches('${VOCABULARY}')`,
    message: "write a vocabulary as 16 hex digits, as status.vocabulary of a DraftPool shows it",
    holds: (text) => isVocabulary.test(text),
  },
]);

export function vocabularyOf(hash: bigint): string {
  return hash.toString(16).padStart(16, "0");
}

/** Undefined for text that `vocabulary` refuses. */
export function vocabularyHash(text: string): bigint | undefined {
  return isVocabulary.test(text) ? BigInt(`0x${text}`) : undefined;
}
