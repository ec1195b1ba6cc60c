// What speculation needs of a message bus: fire and forget, at most once, bounded. Two real implementations: core NATS, and
// one in memory for leaders and drafts that share a process.
import { connect, type NatsConnection } from "@nats-io/transport-node";
import type { TlsMaterial } from "../../proto/trust.ts";

export interface Bus {
  /** Drops the message where the bus is away: a late hint is worthless. */
  publish(subject: string, data: Uint8Array): void;
  /** `*` stands for one word of the subject. Returns how to end the subscription. */
  subscribe(subject: string, handle: (data: Uint8Array, subject: string) => void): () => void;
  readonly isConnected: boolean;
  close(): Promise<void>;
}

/** Of one message, where the server has not said: its own default. */
const PAYLOAD_BYTES_MAX = 1024 * 1024;
/** Messages of one subscription not yet handled; older ones than these are of no use. */
const PENDING_MESSAGES_MAX = 1024;
const RECONNECT_WAIT_MS = 200;

export type NatsOptions = {
  url: string;
  /** Empty: the token alone says who we are. */
  user?: string;
  token: string;
  name: string;
  tls?: TlsMaterial | undefined;
};

/** Core NATS. Connects in the background and for ever: a server that is away means no hints, nothing else. */
export function natsBus(options: NatsOptions): Bus {
  type Subscription = { subject: string; handle: (data: Uint8Array, subject: string) => void; end?: () => void };
  const subscriptions = new Set<Subscription>();
  let connection: NatsConnection | undefined;
  let isUp = false;
  let isClosed = false;

  const attach = (to: NatsConnection, subscription: Subscription) => {
    const handle = to.subscribe(subscription.subject, {
      callback: (error, message) => {
        if (!error) subscription.handle(message.data, message.subject);
      },
    });
    subscription.end = () => handle.unsubscribe();
  };

  const run = async () => {
    while (!isClosed) {
      try {
        connection = await connect({
          servers: options.url,
          ...identityOf(options),
          name: options.name,
          maxReconnectAttempts: -1,
          reconnectTimeWait: RECONNECT_WAIT_MS,
          reconnectJitter: RECONNECT_WAIT_MS,
          timeout: 2_000,
          noEcho: true,
          pingInterval: 5_000,
        });
        break;
      } catch {
        await new Promise((wake) => setTimeout(wake, RECONNECT_WAIT_MS));
      }
    }
    if (!connection) return;
    if (isClosed) return void connection.close();
    isUp = true;
    for (const subscription of subscriptions) attach(connection, subscription);
    for await (const status of connection.status()) {
      if (status.type === "disconnect" || status.type === "reconnecting") isUp = false;
      else if (status.type === "reconnect") isUp = true;
    }
    isUp = false;
  };
  const running = run();

  return {
    get isConnected() {
      return isUp;
    },
    publish(subject, data) {
      if (!isUp || !connection || connection.isClosed()) return;
      // The client throws above what the server takes.
      if (data.length > (connection.info?.max_payload ?? PAYLOAD_BYTES_MAX)) return;
      connection.publish(subject, data);
    },
    subscribe(subject, handle) {
      const subscription: Subscription = { subject, handle };
      subscriptions.add(subscription);
      if (connection && !connection.isClosed()) attach(connection, subscription);
      return () => {
        subscriptions.delete(subscription);
        subscription.end?.();
      };
    },
    async close() {
      isClosed = true;
      isUp = false;
      if (connection) await connection.close();
      await running;
    },
  };
}

/** One process, no server: messages are delivered in order, each in a turn of its own. */
export class MemoryBus implements Bus {
  readonly isConnected = true;
  readonly #handlers = new Set<{ pattern: RegExp; handle: (data: Uint8Array, subject: string) => void }>();
  readonly #queue: { subject: string; data: Uint8Array }[] = [];
  #isClosed = false;

  publish(subject: string, data: Uint8Array): void {
    if (this.#isClosed) return;
    if (this.#queue.length >= PENDING_MESSAGES_MAX) this.#queue.shift();
    this.#queue.push({ subject, data });
    if (this.#queue.length === 1) setImmediate(() => this.#deliver());
  }

  subscribe(subject: string, handle: (data: Uint8Array, subject: string) => void): () => void {
    const pattern = new RegExp(`^${subject.replaceAll(".", "\\.").replaceAll("*", "[^.]+")}$`);
    const handler = { pattern, handle };
    this.#handlers.add(handler);
    return () => this.#handlers.delete(handler);
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#handlers.clear();
    this.#queue.length = 0;
  }

  #deliver(): void {
    const message = this.#queue.shift();
    if (!message) return;
    if (this.#queue.length > 0) setImmediate(() => this.#deliver());
    for (const { pattern, handle } of [...this.#handlers]) {
      if (pattern.test(message.subject)) handle(message.data, message.subject);
    }
  }
}

function identityOf({ user = "", token, tls }: NatsOptions) {
  const who = user === "" ? (token === "" ? {} : { token }) : { user, pass: token };
  return tls === undefined ? who : { ...who, tls };
}
