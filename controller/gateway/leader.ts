// One long-lived Submit stream to one leader of one incarnation, and its Stats. Owns the connection, nothing of the requests:
// a link that is down stays down, whoever wants to go on makes another.

import type { ChannelCredentials, ClientDuplexStream, ClientReadableStream } from "@grpc/grpc-js";
import type {
  Chunk,
  Open,
  SubmitRequest,
  SubmitResponse,
  TokenIds,
  TokenizeIdsRequest,
  WorkerStats,
} from "../../proto/gen/muster/v1/worker.ts";
import { WorkerClient } from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import type { Leader } from "./watch.ts";

/** Tokenizing is a few milliseconds; a leader that takes so long is not answering. */
const TOKENIZE_TIMEOUT_MS = 10_000;

export type LinkEvents = {
  /** All that one step brought. */
  chunks(chunks: Chunk[]): void;
  /** New figures, or none any more. */
  stats(stats: WorkerStats | undefined): void;
  /** Once; the link is dead from here on. */
  down(detail: string): void;
};

export class LeaderLink {
  readonly leader: Leader;
  #client: WorkerClient;
  #submit: ClientDuplexStream<SubmitRequest, SubmitResponse>;
  #stats: ClientReadableStream<WorkerStats>;
  #events: LinkEvents;
  #isDown = false;

  constructor(leader: Leader, credentials: ChannelCredentials, events: LinkEvents) {
    this.leader = leader;
    this.#events = events;
    this.#client = new WorkerClient(leader.address, credentials, channelOptions);
    this.#submit = this.#client.submit();
    this.#submit.on("data", (response: SubmitResponse) => {
      if (!this.#isDown) events.chunks(response.chunks);
    });
    this.#submit.on("error", (error) => this.#down(error.message));
    this.#submit.on("end", () => this.#down("the leader ended the stream"));
    this.#stats = this.#client.stats({ incarnation: leader.incarnation });
    this.#stats.on("data", (stats: WorkerStats) => events.stats(stats));
    // Figures only: whether the leader lives is decided by the Submit stream.
    this.#stats.on("error", () => events.stats(undefined));
  }

  open(open: Open): void {
    this.#send({ $case: "open", value: open });
  }

  cancel(id: number): void {
    this.#send({ $case: "cancel", value: { id } });
  }

  tokenize(input: NonNullable<TokenizeIdsRequest["input"]>): Promise<number[]> {
    const request: TokenizeIdsRequest = { incarnation: this.leader.incarnation, input };
    const deadline = Date.now() + TOKENIZE_TIMEOUT_MS;
    return new Promise((resolve, reject) => {
      const answer = (error: Error | null, ids: TokenIds | undefined) =>
        error ? reject(error) : resolve(ids?.ids ?? []);
      this.#client.makeUnaryRequest(
        WorkerClient.service.tokenize.path,
        WorkerClient.service.tokenize.requestSerialize,
        WorkerClient.service.tokenize.responseDeserialize,
        request,
        { deadline },
        answer,
      );
    });
  }

  /** Leaves without telling `down`. */
  close(): void {
    this.#isDown = true;
    this.#release();
  }

  #send(kind: NonNullable<SubmitRequest["kind"]>): void {
    if (!this.#isDown) this.#submit.write({ incarnation: this.leader.incarnation, kind });
  }

  #down(detail: string): void {
    if (this.#isDown) return;
    this.#isDown = true;
    this.#release();
    this.#events.down(detail);
  }

  #release(): void {
    this.#submit.on("error", () => {});
    this.#submit.cancel();
    this.#stats.cancel();
    this.#client.close();
  }
}
