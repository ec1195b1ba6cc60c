// Where the gateway's view comes from: whole states, one after another. Owns the seam and the feed of a controller's Control
// service; the feed of a cluster is handed in by whoever wires the program.
//   F1  A feed never ends but by its signal: one that has lost its source says why (`trouble`) and tries again with back-off.
import type { ClientReadableStream } from "@grpc/grpc-js";
import type { WatchEvent } from "../../proto/gen/muster/v1/control.ts";
import { ControlClient } from "../../proto/gen/muster/v1/control.ts";
import { channelOptions } from "../../proto/grpc.ts";
import { noTrust, type Trust } from "../../proto/trust.ts";

export interface Feed {
  /** Who is asked, for messages. */
  readonly source: string;
  /** Why the state that was told last may be old; undefined while it is not. */
  readonly trouble: string | undefined;
  /** Tells every state; resolves when aborted, rejects only where it is broken itself. */
  run(tell: (event: WatchEvent) => void, signal: AbortSignal): Promise<void>;
}

const BACKOFF_MIN_MS = 100;
const BACKOFF_MAX_MS = 2_000;

/** `address`: gRPC target of the Control service. */
export class ControlFeed implements Feed {
  readonly source: string;
  trouble: string | undefined = "not connected yet";
  readonly #trust: Trust;
  #backoffMs = BACKOFF_MIN_MS;

  constructor(address: string, trust: Trust = noTrust) {
    this.source = `the controller at ${address}`;
    this.#address = address;
    this.#trust = trust;
  }

  readonly #address: string;

  async run(tell: (event: WatchEvent) => void, signal: AbortSignal): Promise<void> {
    const credentials = this.#trust.channel({ role: "controller" });
    const client = new ControlClient(this.#address, credentials, channelOptions);
    try {
      while (!signal.aborted) {
        this.trouble = await this.#watch(client, tell, signal);
        if (signal.aborted) return;
        const waitMs = this.#backoffMs * (0.5 + Math.random() / 2);
        this.#backoffMs = Math.min(this.#backoffMs * 2, BACKOFF_MAX_MS);
        await sleep(waitMs, signal);
      }
    } finally {
      client.close();
    }
  }

  /** Resolves with why the stream has ended. */
  #watch(client: ControlClient, tell: (event: WatchEvent) => void, signal: AbortSignal): Promise<string> {
    const call: ClientReadableStream<WatchEvent> = client.watch({});
    const cancel = () => call.cancel();
    signal.addEventListener("abort", cancel, { once: true });
    const { promise, resolve } = Promise.withResolvers<string>();
    call.on("data", (event: WatchEvent) => {
      this.trouble = undefined;
      this.#backoffMs = BACKOFF_MIN_MS;
      if (!signal.aborted) tell(event);
    });
    call.on("error", (error) => resolve(error.message));
    call.on("end", () => resolve("the controller ended the stream"));
    return promise.finally(() => signal.removeEventListener("abort", cancel));
  }
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal.addEventListener("abort", end, { once: true });
  });
}
