// What the gateway knows of models and leaders: the last state the controller told. Owns the Watch stream and its
// reconnecting; decides nothing.
//   W1  A lost stream keeps the last state: the gateway outlives its controller.
//   W2  A model that is not serving has one `downSince`, whoever asks.

import type { ClientReadableStream } from "@grpc/grpc-js";
import { credentials } from "@grpc/grpc-js";
import type { ServedModel, WatchEvent } from "../../proto/gen/muster/v1/control.ts";
import { ControlClient, Phase } from "../../proto/gen/muster/v1/control.ts";
import { channelOptions } from "../../proto/grpc.ts";

const BACKOFF_MIN_MS = 100;
const BACKOFF_MAX_MS = 2_000;

/** A leader that can be asked now: equal keys are the same process. */
export type Leader = { key: string; address: string; incarnation: bigint };

export type ModelView = {
  readonly served: ServedModel;
  /** Nothing while the model has no leader. */
  readonly leader: Leader | undefined;
  /** Since when there is no leader, on the gateway's clock. */
  readonly downSince: number | undefined;
};

function leaderOf(served: ServedModel): Leader | undefined {
  const canServe = served.phase === Phase.SERVING || served.phase === Phase.DEGRADED;
  if (!canServe || served.leaderAddress === "") return undefined;
  const { leaderAddress: address, incarnation } = served;
  return { key: `${address}#${incarnation}`, address, incarnation };
}

/** The state after an event; what was down before stays down since then. */
export function viewOf(event: WatchEvent, before: ReadonlyMap<string, ModelView>, now: number): Map<string, ModelView> {
  const views = new Map<string, ModelView>();
  for (const served of event.models) {
    const leader = leaderOf(served);
    const downSince = leader ? undefined : (before.get(served.name)?.downSince ?? now);
    views.set(served.name, { served, leader, downSince });
  }
  return views;
}

export class ControlView {
  #models = new Map<string, ModelView>();
  #byAlias = new Map<string, ModelView>();
  #client: ControlClient;
  #call: ClientReadableStream<WatchEvent> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #backoffMs = BACKOFF_MIN_MS;
  #stopped = false;
  #listeners: (() => void)[] = [];
  /** Whether the controller has ever told its state. */
  told = false;
  /** Whether the stream stands now. */
  connected = false;
  readonly address: string;

  constructor(address: string) {
    this.address = address;
    this.#client = new ControlClient(address, credentials.createInsecure(), channelOptions);
    this.#watch();
  }

  models(): ModelView[] {
    return [...this.#models.values()];
  }

  /** By name or alias; nothing where no model is called so. */
  find(name: string): ModelView | undefined {
    return this.#models.get(name) ?? this.#byAlias.get(name);
  }

  onChange(listener: () => void): void {
    this.#listeners.push(listener);
  }

  close(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#call?.cancel();
    this.#client.close();
  }

  #watch(): void {
    const call = this.#client.watch({});
    this.#call = call;
    let over = false;
    const end = () => {
      if (over) return;
      over = true;
      this.#lost();
    };
    call.on("data", (event: WatchEvent) => this.#take(event));
    call.on("error", end);
    call.on("end", end);
  }

  #take(event: WatchEvent): void {
    this.told = true;
    this.connected = true;
    this.#backoffMs = BACKOFF_MIN_MS;
    this.#models = viewOf(event, this.#models, performance.now());
    this.#byAlias = new Map();
    for (const view of this.#models.values()) {
      for (const alias of view.served.aliases) this.#byAlias.set(alias, view);
    }
    for (const listener of this.#listeners) listener();
  }

  #lost(): void {
    this.connected = false;
    if (this.#stopped) return;
    const wait = this.#backoffMs * (0.5 + Math.random() / 2);
    this.#backoffMs = Math.min(this.#backoffMs * 2, BACKOFF_MAX_MS);
    this.#timer = setTimeout(() => this.#watch(), wait);
  }
}
