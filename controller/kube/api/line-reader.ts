// Bytes that come in pieces, as lines. Bounded: a line that does not end is an error, not memory.

const NEWLINE = 0x0a;

/** Empty lines are left out; a last line without its end is half a message, and is dropped. */
export async function* linesOf(chunks: AsyncIterable<Uint8Array>, bytesMax: number): AsyncGenerator<string> {
  let parts: Uint8Array[] = [];
  let held = 0;
  for await (const chunk of chunks) {
    let from = 0;
    for (let end = chunk.indexOf(NEWLINE); end >= 0; end = chunk.indexOf(NEWLINE, from)) {
      if (held + end - from > bytesMax) throw new RangeError(`a line is longer than ${bytesMax} bytes`);
      parts.push(chunk.subarray(from, end));
      const line = Buffer.concat(parts).toString("utf8").trim();
      if (line !== "") yield line;
      parts = [];
      held = 0;
      from = end + 1;
    }
    if (from < chunk.length) parts.push(chunk.subarray(from));
    held += chunk.length - from;
    if (held > bytesMax) throw new RangeError(`a line is longer than ${bytesMax} bytes`);
  }
}
