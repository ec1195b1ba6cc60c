// The load of the overhead bench: one process, one raw socket for each stream, so that what a client costs is told apart and is
// small. While the clock runs it only collects bytes and looks for an answer's end; they are read when it has stopped.
// Forked by overhead.ts; takes one Ask at a time and answers with Done, then with Read when it is asked for.
import { connect, type Socket } from "node:net";

export type Order = { kind: "ask"; port: number; bodies: string[] } | { kind: "read" };
/** What one stream said: `ids` and `promptIds` are empty where the request did not ask for them. */
export type Said = { text: string; tokens: number; ids: number[]; promptIds: number[] };
export type Reply = { kind: "done"; ms: number } | { kind: "read"; said: Said[] } | { kind: "failed"; detail: string };

const STREAM_BYTES_MAX = 64 * 1024 * 1024;
/** The empty chunk that ends an answer of HTTP/1.1. */
const END = "0\r\n\r\n";

class Stream {
  pieces: Buffer[] = [];
  #socket: Socket;
  #bytes = 0;
  #tail = "";
  #waiting: PromiseWithResolvers<void> | undefined;

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on("data", (piece) => this.#take(piece));
    socket.on("error", (error) => this.#waiting?.reject(error));
    socket.on("close", () => this.#waiting?.reject(new Error("the gateway closed the connection")));
  }

  static open(port: number): Promise<Stream> {
    return new Promise((resolve, reject) => {
      const socket = connect({ port, host: "127.0.0.1", noDelay: true }, () => resolve(new Stream(socket)));
      socket.on("error", reject);
    });
  }

  ask(head: string): Promise<void> {
    this.pieces = [];
    this.#bytes = 0;
    this.#waiting = Promise.withResolvers();
    this.#socket.write(head);
    return this.#waiting.promise;
  }

  close(): void {
    this.#waiting = undefined;
    this.#socket.destroy();
  }

  #take(piece: Buffer): void {
    this.pieces.push(piece);
    this.#bytes += piece.length;
    this.#tail = (this.#tail + piece.toString("latin1", Math.max(0, piece.length - END.length))).slice(-END.length);
    if (this.#tail === END) this.#waiting?.resolve();
    else if (this.#bytes > STREAM_BYTES_MAX) this.#waiting?.reject(new Error(`more than ${STREAM_BYTES_MAX} bytes`));
  }
}

/** The payload of an answer, its chunks joined. Throws where the status is not 200. */
function bodyOf(answer: Buffer): string {
  const headEnd = answer.indexOf("\r\n\r\n");
  const head = answer.toString("latin1", 0, headEnd);
  if (!head.startsWith("HTTP/1.1 200 ")) throw new Error(answer.toString("utf8", 0, 2000));
  const parts: Buffer[] = [];
  let at = headEnd + 4;
  for (;;) {
    const lineEnd = answer.indexOf("\r\n", at);
    const size = Number.parseInt(answer.toString("latin1", at, lineEnd), 16);
    if (!(size > 0)) return Buffer.concat(parts).toString("utf8");
    parts.push(answer.subarray(lineEnd + 2, lineEnd + 2 + size));
    at = lineEnd + 2 + size + 2;
  }
}

function saidBy(answer: Buffer): Said {
  const said: Said = { text: "", tokens: 0, ids: [], promptIds: [] };
  const events = bodyOf(answer).split("\n\n");
  if (events.at(-2) !== "data: [DONE]") throw new Error(`the stream ended with ${events.at(-2)}`);
  for (const event of events.slice(0, -2)) {
    if (!event.startsWith("data: ")) continue;
    const { choices, usage, error } = JSON.parse(event.slice(6));
    if (error) throw new Error(JSON.stringify(error));
    said.text += choices[0]?.text ?? "";
    said.ids.push(...(choices[0]?.muster?.token_ids ?? []));
    said.promptIds.push(...(choices[0]?.muster?.prompt_token_ids ?? []));
    said.tokens += usage?.completion_tokens ?? 0;
  }
  return said;
}

const streams: Stream[] = [];

const requestOf = (body: string): string =>
  `POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`;

async function obey(order: Order): Promise<Reply> {
  if (order.kind === "read") return { kind: "read", said: streams.map(({ pieces }) => saidBy(Buffer.concat(pieces))) };
  while (streams.length < order.bodies.length) streams.push(await Stream.open(order.port));
  const requests = order.bodies.map(requestOf);
  const started = performance.now();
  await Promise.all(streams.map((stream, index) => stream.ask(requests[index] ?? "")));
  return { kind: "done", ms: performance.now() - started };
}

const reply = (message: Reply): void => void process.send?.(message);

process.on("message", (order: Order) => {
  obey(order).then(reply, (error) => reply({ kind: "failed", detail: error instanceof Error ? error.message : "" }));
});
process.on("disconnect", () => {
  for (const stream of streams) stream.close();
});
