// A gateway between a controller that tells what the test says and leaders that the test starts: real servers on loopback.
import { Server, ServerCredentials, type ServerWritableStream } from "@grpc/grpc-js";
import { ControlFeed } from "../../../controller/gateway/feed.ts";
import type { GatewayLimits } from "../../../controller/gateway/limits.ts";
import { type GatewayAddresses, type GatewayOptions, runGateway } from "../../../controller/gateway/main.ts";
import {
  type ControlServer,
  ControlService,
  Phase,
  type ServedModel,
  type WatchEvent,
  type WatchRequest,
} from "../../../proto/gen/muster/v1/control.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { CONTEXT, type LeaderOptions, ScriptedLeader, VOCAB } from "./scripted-leader.ts";

export const MODEL = "nano";

export class ScriptedController {
  address = "";
  #server = new Server(channelOptions);
  #watchers = new Set<ServerWritableStream<WatchRequest, WatchEvent>>();
  #models: ServedModel[] = [];
  #version = 0n;

  async start(port = 0): Promise<void> {
    this.#server = new Server(channelOptions);
    const service: ControlServer = {
      watch: (call: ServerWritableStream<WatchRequest, WatchEvent>) => {
        this.#watchers.add(call);
        call.on("cancelled", () => this.#watchers.delete(call));
        call.write(this.#event());
      },
      shutdown: (_call, respond) => respond(null, {}),
    };
    this.#server.addService(ControlService, service);
    const bound = await new Promise<number>((resolve, reject) => {
      this.#server.bindAsync(`127.0.0.1:${port}`, ServerCredentials.createInsecure(), (error, taken) =>
        error ? reject(error) : resolve(taken),
      );
    });
    this.address = `127.0.0.1:${bound}`;
  }

  tell(models: ServedModel[]): void {
    this.#models = models;
    this.#version += 1n;
    for (const watcher of this.#watchers) watcher.write(this.#event());
  }

  kill(): void {
    this.#watchers.clear();
    this.#server.forceShutdown();
  }

  #event(): WatchEvent {
    return { version: this.#version, models: this.#models, drafts: [] };
  }
}

export function servedModel(leader: ScriptedLeader | undefined, changes: Partial<ServedModel> = {}): ServedModel {
  return {
    name: MODEL,
    aliases: ["nano-alias"],
    revision: leader?.options.revision ?? "r1",
    numericsId: leader?.options.numericsId ?? "",
    incarnation: leader?.options.incarnation ?? 0n,
    leaderAddress: leader?.address ?? "",
    phase: leader ? Phase.SERVING : Phase.CONNECTING,
    cause: leader ? "" : "waiting for rank 1",
    sinceUnixMs: 0n,
    readyRanks: 1,
    world: 1,
    restarts: 0,
    bytesLoaded: 0n,
    bytesTotal: 0n,
    contextTokens: CONTEXT,
    family: "llama4",
    hasChatTemplate: true,
    createdUnixS: 1n,
    vocabSize: VOCAB,
    replica: "",
    namespace: "",
    deployment: "",
    draining: false,
    ...changes,
  };
}

export type Bed = {
  controller: ScriptedController;
  leaders: ScriptedLeader[];
  http: string;
  grpc: string;
  /** Starts a leader and tells the gateway of it. */
  serve(options?: Partial<LeaderOptions>): Promise<ScriptedLeader>;
  /** Starts a leader and tells nobody. */
  launch(options?: Partial<LeaderOptions>): Promise<ScriptedLeader>;
  stop(): Promise<void>;
};

export type BedOptions = {
  limits?: Partial<GatewayLimits>;
  apiKey?: string;
  leader?: Partial<LeaderOptions> | "none";
  gateway?: Pick<GatewayOptions, "demand" | "readyWithoutModels" | "trust">;
};

/** A gateway with one leader serving, unless said otherwise. */
export async function makeBed(options: BedOptions = {}): Promise<Bed> {
  const controller = new ScriptedController();
  await controller.start();
  const leaders: ScriptedLeader[] = [];
  const stop = new AbortController();
  const launch = async (leaderOptions: Partial<LeaderOptions> = {}): Promise<ScriptedLeader> => {
    const leader = new ScriptedLeader({ incarnation: BigInt(leaders.length + 1), ...leaderOptions });
    leaders.push(leader);
    await leader.start();
    return leader;
  };
  const serve = async (leaderOptions: Partial<LeaderOptions> = {}): Promise<ScriptedLeader> => {
    const leader = await launch(leaderOptions);
    controller.tell([servedModel(leader)]);
    return leader;
  };
  if (options.leader !== "none") await serve(options.leader);
  const { addresses, ended } = await startGateway(
    {
      feed: new ControlFeed(controller.address),
      http: "127.0.0.1:0",
      grpc: "127.0.0.1:0",
      apiKey: options.apiKey,
      ...options.gateway,
      ...(options.limits ? { limits: options.limits } : {}),
    },
    stop.signal,
  );
  if (options.leader !== "none") await until(async () => (await fetch(`${addresses.http}/readyz`)).ok);
  return {
    controller,
    leaders,
    ...addresses,
    serve,
    launch,
    stop: async () => {
      stop.abort();
      await ended;
      for (const leader of leaders) leader.kill();
      controller.kill();
    },
  };
}

export async function startGateway(
  options: GatewayOptions,
  signal: AbortSignal,
): Promise<{ addresses: GatewayAddresses; ended: Promise<void> }> {
  const { promise, resolve, reject } = Promise.withResolvers<GatewayAddresses>();
  const ended = runGateway({ ...options, onListening: resolve }, signal);
  ended.catch(reject);
  return { addresses: await promise, ended };
}

/** Waits for a condition, looked at every few milliseconds, with a bound. */
export async function until(condition: () => boolean | Promise<boolean>, boundMs = 10_000): Promise<void> {
  const end = performance.now() + boundMs;
  while (!(await condition())) {
    if (performance.now() > end) throw new Error(`not within ${boundMs} ms: ${condition.toString()}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
