// A streamed answer on one socket. Owns what has been written and whether the client keeps up; the head goes out with the
// first event, so that a refusal before it is still an HTTP status.
//   C1  All that one step brings to a socket is one write.
//   C2  A client that does not read for stallMs, or has left more than socketBytesMax unread when a step comes, is dropped.
//   C3  Chunks are framed here and go to the socket as one string: ServerResponse.write makes four pieces of each, which
//       costs about a fifth of a token's time. Head and end stay with ServerResponse.
import type { ServerResponse } from "node:http";
import type { Chunk, Fault } from "../../proto/gen/muster/v1/worker.ts";
import type { Sink } from "./job.ts";
import type { GatewayLimits } from "./limits.ts";
import {
  type Answer,
  DONE_EVENT,
  detailEvent,
  errorEvent,
  type Frame,
  finishEvent,
  roleEvent,
  textFrame,
  usageEvent,
  waitingComment,
} from "./openai-answer.ts";
import type { Choice } from "./requests.ts";

export type SseOptions = {
  response: ServerResponse;
  answer: Answer;
  n: number;
  limits: GatewayLimits;
  headers: Record<string, string>;
  /** The head is about to be written: the response is the sink's from here on. */
  begin(): void;
  /** The answer was refused before anything was written. */
  refused(fault: Fault): void;
  /** The answer is over, whole or not. */
  over(status: "whole" | "failed" | "dropped"): void;
};

export class SseSink implements Sink {
  readonly #options: SseOptions;
  readonly #frames: (Frame | undefined)[] = [];
  readonly #choices: Choice[] = [];
  readonly #detailed: boolean;
  #buffer = "";
  #begun = false;
  /** Whether the kernel has taken a write since the last look, and since when it takes none. */
  #hasMoved = false;
  #stalledSince = 0;
  readonly #onTaken = (): void => {
    this.#hasMoved = true;
  };
  #isOver = false;

  constructor(options: SseOptions) {
    this.#options = options;
    const { logprobs, returnTokenIds } = options.answer.presentation;
    this.#detailed = logprobs || returnTokenIds;
  }

  chunk(choice: Choice, chunk: Chunk): void {
    const { index } = choice;
    let frame = this.#frames[index];
    const isFirst = frame === undefined;
    if (frame === undefined) {
      frame = this.#beginChoice(choice);
    }
    if (this.#detailed) {
      const { text, tokens, logprobs } = chunk;
      if (isFirst || tokens.length > 0 || text !== "") {
        const piece = { text, tokens, logprobs, offset: choice.textSent - text.length };
        this.#buffer += detailEvent(this.#options.answer, choice, piece, isFirst);
      }
    } else if (chunk.text !== "") {
      this.#buffer += frame.before + JSON.stringify(chunk.text) + frame.after;
    }
    if (choice.state.kind === "ended") this.#buffer += finishEvent(this.#options.answer, choice);
  }

  #beginChoice(choice: Choice): Frame {
    const { answer } = this.#options;
    const frame = textFrame(answer, choice);
    this.#frames[choice.index] = frame;
    this.#choices[choice.index] = choice;
    if (answer.presentation.api === "chat") this.#buffer += roleEvent(answer, choice);
    return frame;
  }

  flush(): void {
    if (this.#buffer === "") return;
    const data = this.#buffer;
    this.#buffer = "";
    this.#write(data);
  }

  waiting(why: string): void {
    this.#write(waitingComment(why));
  }

  done(): void {
    const { answer, n, response } = this.#options;
    let last = "";
    if (answer.presentation.includeUsage) last += usageEvent(answer, this.#choices, n);
    this.#begin();
    response.end(last + DONE_EVENT);
    this.#end("whole");
  }

  failed(fault: Fault): void {
    const { response, refused } = this.#options;
    if (!this.#begun) {
      this.#end("failed");
      refused(fault);
      return;
    }
    response.end(this.#buffer + errorEvent(fault));
    this.#end("failed");
  }

  /** C2: whether the client has not read for too long; looked at from time to time. */
  isStalled(now: number): boolean {
    const { limits, response } = this.#options;
    if (response.writableLength === 0 || this.#hasMoved || this.#stalledSince === 0) {
      this.#hasMoved = false;
      this.#stalledSince = now;
      return false;
    }
    return now - this.#stalledSince >= limits.stallMs;
  }

  drop(): void {
    if (this.#isOver) return;
    this.#options.response.destroy();
    this.#end("dropped");
  }

  #begin(): void {
    if (this.#begun) return;
    this.#begun = true;
    this.#options.begin();
    this.#options.response.writeHead(200, {
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache",
      "x-accel-buffering": "no",
      ...this.#options.headers,
    });
    this.#options.response.flushHeaders();
  }

  #write(data: string): void {
    if (this.#isOver) return;
    this.#begin();
    const { response, limits } = this.#options;
    if (response.writableLength > limits.socketBytesMax) {
      this.drop();
      return;
    }
    const { socket } = response;
    // HTTP/1.0 knows no chunks, and a pipelined answer has no socket before its turn.
    if (socket === null || !response.chunkedEncoding) response.write(data, this.#onTaken);
    else socket.write(`${Buffer.byteLength(data).toString(16)}\r\n${data}\r\n`, this.#onTaken);
  }

  #end(status: "whole" | "failed" | "dropped"): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#options.over(status);
  }
}
