// Tells the controller that leads what clients ask of this gateway (report.proto, Demand): it scales by it and wakes what
// sleeps. Owns the stream and its back-off; what is counted is demand-count.ts and streams.ts.
//   D1  Within `changeMs` of a change it is told, without one every `quietMs`; a controller that does not read gets less, never
//       a backlog.
//   D2  Counters of a stream begin at 0 with it: what came while there was none is in `held` and `running` as far as it counts.
//   D3  No request waits for it: without a controller the gateway serves on.
import type { ClientDuplexStream } from "@grpc/grpc-js";
import type { DemandReport, ModelDemand, ReportTaken } from "../../proto/gen/muster/v1/report.ts";
import { ReportsClient } from "../../proto/gen/muster/v1/report.ts";
import { channelOptions } from "../../proto/grpc.ts";
import type { Trust } from "../../proto/trust.ts";
import type { DemandCount } from "./demand-count.ts";

/** One model now. */
export type Asked = { namespace: string; deployment: string; held: number; running: number; count: DemandCount };

export type DemandLimits = { changeMs: number; quietMs: number; backoffMinMs: number; backoffMaxMs: number };

export const demandLimits: DemandLimits = { changeMs: 1_000, quietMs: 10_000, backoffMinMs: 250, backoffMaxMs: 10_000 };

export type DemandOptions = {
  /** gRPC target of the Reports service. */
  target: string;
  trust: Trust;
  /** Of this process and no other. */
  gateway: string;
  /** Every model that somebody is to be told of. */
  read: () => readonly Asked[];
  limits?: Partial<DemandLimits>;
};

type Call = ClientDuplexStream<DemandReport, ReportTaken>;
type Baseline = { arrivals: number; failures: number };

/** The name stands for the Lease holder, who changes: it is looked up again this soon after a connection is lost. */
const RESOLVE_MS_MIN = 1_000;

export class DemandClient {
  readonly #options: DemandOptions;
  readonly #limits: DemandLimits;
  readonly #client: ReportsClient;
  readonly #tick: NodeJS.Timeout;
  #retry: NodeJS.Timeout | undefined;
  #call: Call | undefined;
  #isFull = false;
  #isUp = false;
  #isClosed = false;
  #backoffMs: number;
  #baselines = new WeakMap<DemandCount, Baseline>();
  #sent = "";
  #sentMs = 0;

  constructor(options: DemandOptions) {
    this.#options = options;
    this.#limits = { ...demandLimits, ...options.limits };
    this.#backoffMs = this.#limits.backoffMinMs;
    const credentials = options.trust.channel({ role: "controller" });
    const resolving = { "grpc.dns_min_time_between_resolutions_ms": RESOLVE_MS_MIN };
    this.#client = new ReportsClient(options.target, credentials, { ...channelOptions, ...resolving });
    this.#tick = setInterval(() => this.#report(), this.#limits.changeMs);
    this.#tick.unref();
    this.#open();
  }

  /** Whether a controller has taken a report of the present stream. */
  get isUp(): boolean {
    return this.#isUp;
  }

  close(): void {
    this.#isClosed = true;
    clearInterval(this.#tick);
    clearTimeout(this.#retry);
    this.#call?.cancel();
    this.#client.close();
  }

  #open(): void {
    const call = this.#client.demand();
    this.#call = call;
    this.#isFull = false;
    this.#sent = "";
    this.#baselines = new WeakMap();
    for (const { count } of this.#options.read()) {
      this.#baselines.set(count, { arrivals: count.arrivals, failures: count.failures });
    }
    let over = false;
    const end = () => {
      if (over) return;
      over = true;
      this.#lost();
    };
    call.on("data", () => {
      this.#isUp = true;
      this.#backoffMs = this.#limits.backoffMinMs;
    });
    call.on("drain", () => {
      this.#isFull = false;
    });
    call.on("error", end);
    call.on("end", end);
    this.#report();
  }

  #lost(): void {
    this.#call?.cancel();
    this.#call = undefined;
    this.#isUp = false;
    if (this.#isClosed) return;
    const wait = this.#backoffMs * (0.5 + Math.random() / 2);
    this.#backoffMs = Math.min(this.#backoffMs * 2, this.#limits.backoffMaxMs);
    this.#retry = setTimeout(() => this.#open(), wait);
    this.#retry.unref();
  }

  #report(): void {
    if (this.#call === undefined || this.#isFull) return;
    const all = this.#options.read().map((one) => ({ one, demand: this.#demandOf(one) }));
    const counted = all.filter(({ demand }) => isAsked(demand));
    const now = performance.now();
    const text = JSON.stringify(
      counted.map(({ demand }) => demand),
      (_, value) => (typeof value === "bigint" ? String(value) : value),
    );
    if (text === this.#sent && now - this.#sentMs < this.#limits.quietMs) return;
    this.#sent = text;
    this.#sentMs = now;
    const models = counted.map(({ one, demand }) => ({ ...demand, ...one.count.takeLatencies() }));
    this.#isFull = !this.#call.write({ gateway: this.#options.gateway, models });
  }

  #demandOf({ namespace, deployment, held, running, count }: Asked): ModelDemand {
    // One that is new since the stream began has its counters from 0.
    const base = this.#baselines.get(count) ?? { arrivals: 0, failures: 0 };
    this.#baselines.set(count, base);
    const arrivals = BigInt(count.arrivals - base.arrivals);
    const failures = BigInt(count.failures - base.failures);
    return { namespace, deployment, held, running, arrivals, failures, ttftMs: 0, itlMs: 0 };
  }
}

const isAsked = ({ held, running, arrivals, failures }: ModelDemand): boolean =>
  held > 0 || running > 0 || arrivals > 0n || failures > 0n;
