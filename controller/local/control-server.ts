// The controller's Control service: tells gateways and `muster status` what is served, as whole states on one stream each.
import { Server, ServerCredentials, type ServerWritableStream } from "@grpc/grpc-js";
import {
  ControlService,
  type DraftStatus,
  type ServedModel,
  type ShutdownRequest,
  ShutdownResponse,
  type WatchEvent,
  type WatchRequest,
} from "../../proto/gen/muster/v1/control.ts";
import { channelOptions } from "../../proto/grpc.ts";

/** Watchers at once; a gateway and some terminals are a handful. */
const WATCHERS_MAX = 256;

export class ControlServer {
  readonly #server = new Server(channelOptions);
  readonly #watchers = new Set<ServerWritableStream<WatchRequest, WatchEvent>>();
  readonly #models = new Map<string, ServedModel>();
  readonly #drafts = new Map<string, DraftStatus>();
  #version = 0n;

  /** Listens on `target` (unix:/path or HOST:PORT); `onShutdown` runs when somebody asks for the end. */
  static async start(target: string, onShutdown: () => void): Promise<ControlServer> {
    const control = new ControlServer(onShutdown);
    await new Promise<void>((done, fail) =>
      control.#server.bindAsync(target, ServerCredentials.createInsecure(), (error) => (error ? fail(error) : done())),
    );
    return control;
  }

  private constructor(onShutdown: () => void) {
    this.#server.addService(ControlService, {
      watch: (call: ServerWritableStream<WatchRequest, WatchEvent>) => {
        if (this.#watchers.size >= WATCHERS_MAX) return void call.end();
        this.#watchers.add(call);
        call.on("close", () => this.#watchers.delete(call));
        call.on("cancelled", () => this.#watchers.delete(call));
        call.write(this.#event());
      },
      shutdown: (_call: { request: ShutdownRequest }, answer: (error: null, value: ShutdownResponse) => void) => {
        answer(null, ShutdownResponse.create());
        onShutdown();
      },
    });
  }

  get models(): readonly ServedModel[] {
    return [...this.#models.values()];
  }

  setModel(model: ServedModel): void {
    this.#models.set(model.name, model);
    this.#tell();
  }

  setDraft(draft: DraftStatus): void {
    this.#drafts.set(draft.pool, draft);
    this.#tell();
  }

  stop(): void {
    for (const watcher of this.#watchers) watcher.end();
    this.#server.forceShutdown();
  }

  #event(): WatchEvent {
    return { version: this.#version, models: [...this.#models.values()], drafts: [...this.#drafts.values()] };
  }

  #tell(): void {
    this.#version++;
    for (const watcher of this.#watchers) watcher.write(this.#event());
  }
}
