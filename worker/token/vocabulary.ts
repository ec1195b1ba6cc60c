// What each token id writes: bytes, from a Hugging Face tokenizer.json. Owns the two ways in which token texts stand for bytes
// (byte-level BPE, SentencePiece with byte fallback); does not own joining them into text (detokenizer.ts).
import { FaultError, invalid } from "../../proto/fault.ts";

const encoder = new TextEncoder();
const NOTHING = new Uint8Array(0);

/** Ids above this are refused: a lying file must not make a table of any size. */
const VOCABULARY_MAX = 1 << 22;

export type Vocabulary = {
  /** Bytes by id; special tokens and unknown ids write nothing. */
  readonly bytes: readonly (Uint8Array | undefined)[];
  /** Contents of special tokens by id: shown beside log-probabilities, never in text. */
  readonly special: ReadonlyMap<number, string>;
  /** Texts of added tokens, special or not, by id. */
  readonly added: ReadonlyMap<number, string>;
};

// GPT-2's byte alphabet: printable bytes stand for themselves, the others for code points from 256 on, in byte order.
function byteAlphabet(): Map<string, number> {
  const alphabet = new Map<string, number>();
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    alphabet.set(String.fromCodePoint(isPrintable ? byte : next++), byte);
  }
  return alphabet;
}

const alphabet = byteAlphabet();

function byteLevelBytes(token: string): Uint8Array {
  const bytes: number[] = [];
  for (const character of token) {
    const byte = alphabet.get(character);
    // A token with a character outside the alphabet (an added one) stands for its own text, as in the library.
    if (byte === undefined) return encoder.encode(token);
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

// "▁" is a space. The leading space of a whole text is kept: what is decoded here goes on after a prompt.
function sentencePieceBytes(token: string): Uint8Array {
  const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
  if (byte?.[1] !== undefined) return Uint8Array.of(Number.parseInt(byte[1], 16));
  return encoder.encode(token.replaceAll("\u2581", " "));
}

type Entry = [token: string, id: number];

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

function modelEntries(model: unknown, where: string): Entry[] {
  const vocab = isRecord(model) ? model.vocab : undefined;
  if (Array.isArray(vocab)) {
    return vocab.map((piece, id): Entry => {
      if (Array.isArray(piece) && typeof piece[0] === "string") return [piece[0], id];
      throw new FaultError(invalid(`${where}: model.vocab[${id}]`, "expected [piece, score]"));
    });
  }
  if (!isRecord(vocab)) throw new FaultError(invalid(`${where}: model.vocab`, "expected an object of token -> id"));
  return Object.entries(vocab).map(([token, id]): Entry => [token, idOf(id, `${where}: model.vocab`)]);
}

function idOf(value: unknown, field: string): number {
  if (typeof value === "number" && Number.isInteger(value) && value >= 0 && value < VOCABULARY_MAX) return value;
  throw new FaultError(invalid(field, `expected ids in 0..${VOCABULARY_MAX - 1}, found ${JSON.stringify(value)}`));
}

// The decoder names the alphabet. Both names may sit inside a Sequence, so the text is searched rather than the shape.
function bytesOf(decoder: unknown, where: string): (token: string) => Uint8Array {
  const text = JSON.stringify(decoder ?? null);
  if (text.includes('"ByteLevel"')) return byteLevelBytes;
  if (text.includes('"ByteFallback"') || text.includes('"Metaspace"')) return sentencePieceBytes;
  throw new FaultError(
    invalid(`${where}: decoder`, "only ByteLevel, ByteFallback and Metaspace decoders are supported", "unsupported"),
  );
}

/** Parses the text of a tokenizer.json; `where` names the file in faults. Throws FaultError (invalid). */
export function parseVocabulary(json: string, where: string): Vocabulary {
  let root: unknown;
  try {
    root = JSON.parse(json);
  } catch (cause) {
    throw new FaultError(invalid(where, `not JSON: ${cause instanceof Error ? cause.message : String(cause)}`), {
      cause,
    });
  }
  if (!isRecord(root)) throw new FaultError(invalid(where, "expected a JSON object"));
  const toBytes = bytesOf(root.decoder, where);
  const bytes: (Uint8Array | undefined)[] = [];
  for (const [token, id] of modelEntries(root.model, where)) bytes[id] = toBytes(token);
  const special = new Map<number, string>();
  const added = new Map<number, string>();
  for (const entry of Array.isArray(root.added_tokens) ? root.added_tokens : []) {
    if (!isRecord(entry) || typeof entry.content !== "string")
      throw new FaultError(invalid(`${where}: added_tokens`, "expected {id, content}"));
    const id = idOf(entry.id, `${where}: added_tokens`);
    added.set(id, entry.content);
    if (entry.special === true) special.set(id, entry.content);
    bytes[id] = entry.special === true ? NOTHING : toBytes(entry.content);
  }
  return { bytes, special, added };
}
