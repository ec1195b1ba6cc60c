// The Reports service: streams of leaders, gateways and inspect pods to the controller that leads. Owns who is heard; what is
// made of it is the board's (groups), the samples' (demand) and the inspections'.
//
//   R1  only while this process leads: anybody else is answered UNAVAILABLE, and looks for the leader again.
//   R2  a group's stream is of the incarnation that its record names and of the pod that is its worker 0: checked with every
//       report, so that what an old incarnation still says is refused from the moment the record moves on.
//   R3  one stream for each group, the newest: a pod that opens another has lost the one before.
//   R4  streams and what they hold are bounded; each report is answered, and nothing is kept for a reader that is behind.
import { Server, type ServerDuplexStream, type ServerReadableStream, type sendUnaryData, status } from "@grpc/grpc-js";
import type {
  DemandReport,
  GroupReport,
  InspectedPart,
  ReportsServer,
  ReportTaken,
} from "../../../proto/gen/muster/v1/report.ts";
import { ReportsService } from "../../../proto/gen/muster/v1/report.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { callerOf, type Identity, noTrust, type Role, type Trust } from "../../../proto/trust.ts";
import { RANKS_MAX } from "../../api/model-deployment.ts";
import { gangPod } from "../gangs/gang-pods.ts";
import { groupOf, recordOf } from "../groups/group-record.ts";
import { podFacts } from "../inventory/pod-facts.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";
import type { LoadSamples } from "../owners/load-samples.ts";
import type { Lead } from "../run-controller.ts";
import type { ReportsBoard, Speaker } from "./reports-board.ts";

/** What takes in what inspect pods have found. Rejects where nobody asked for it. */
export type Inspections = { take(part: InspectedPart): Promise<void> };

export type ReportsOptions = {
  board: ReportsBoard;
  loads: LoadSamples;
  /** Default: every part is refused. */
  inspections?: Inspections;
  metrics?: KubeMetrics;
};

/** More groups than a cluster has places for, and gateways than anybody runs: whoever comes on top is broken. */
const GROUP_STREAMS_MAX = 20_000;
const DEMAND_STREAMS_MAX = 256;
const INSPECTED_STREAMS_MAX = 64;
/** Models that one gateway may speak of. */
const MODELS_MAX = 5_000;
const NAME_MAX = 253;

/** What it needs of a term. */
type Led = { stores: Pick<Lead["stores"], "groups" | "pods">; term: Pick<Lead["term"], "signal"> };

const notAsked: Inspections = {
  take: async () => {
    throw new Refusal(status.UNIMPLEMENTED, "this controller inspects nothing");
  },
};

/** Ends a stream with this status. */
export class Refusal extends Error {
  readonly code: status;
  constructor(code: status, details: string) {
    super(details);
    this.name = "Refusal";
    this.code = code;
  }
}

type GroupCall = ServerDuplexStream<GroupReport, ReportTaken>;
type DemandCall = ServerDuplexStream<DemandReport, ReportTaken>;
type InspectedCall = ServerReadableStream<InspectedPart, ReportTaken>;
type AnyCall = GroupCall | DemandCall | InspectedCall;

export class Reports {
  readonly #options: ReportsOptions;
  #lead: Led | undefined;
  /** All of this term. */
  readonly #calls = new Set<AnyCall>();
  /** By group: whose stream it is (R3). */
  readonly #groups = new Map<string, GroupCall>();
  #demands = 0;
  #inspected = 0;

  constructor(options: ReportsOptions) {
    this.#options = options;
    const { metrics } = options;
    metrics?.gauge("muster_report_streams", { kind: "group" }, () => this.#groups.size);
    metrics?.gauge("muster_report_streams", { kind: "demand" }, () => this.#demands);
    metrics?.gauge("muster_report_streams", { kind: "inspected" }, () => this.#inspected);
  }

  /** While it runs, streams are taken; for `parts` of run-controller.ts. */
  get part(): (lead: Led) => Promise<void> {
    return async (lead) => {
      const { stores, term } = lead;
      try {
        await Promise.all([stores.groups, stores.pods].map((store) => store.synced(term.signal)));
        this.#lead = lead;
        await this.#options.loads.run(term.signal);
      } catch (error) {
        if (!term.signal.aborted) throw error;
      } finally {
        this.#lead = undefined;
        for (const call of [...this.#calls]) this.#end(call, notLeading());
        this.#options.board.clear();
        this.#options.loads.clear();
      }
    };
  }

  get service(): ReportsServer {
    return {
      group: (call) => this.#group(call),
      demand: (call) => this.#demand(call),
      inspected: (call, callback) => void this.#inspect(call, callback),
    };
  }

  // ---- groups ----

  #group(call: GroupCall): void {
    if (!this.#begin(call, this.#groups.size, GROUP_STREAMS_MAX)) return;
    let speaker: Speaker | undefined;
    const leave = this.#leaving(call, () => {
      if (speaker === undefined || this.#groups.get(speaker.group) !== call) return;
      this.#groups.delete(speaker.group);
      this.#options.board.lose(speaker);
    });
    call.on("data", (report: GroupReport) => {
      if (!this.#calls.has(call)) return;
      try {
        const found = this.#speakerOf(report, callerOf(call));
        if (speaker !== undefined && found.group !== speaker.group)
          throw new Refusal(
            status.INVALID_ARGUMENT,
            `group: this stream is of ${speaker.group}, not of ${found.group}`,
          );
        if (speaker === undefined) this.#replace(found.group, call);
        speaker = found;
        this.#options.board.hear(found, report);
        take(call);
      } catch (error) {
        leave();
        this.#end(call, refusalOf(error));
      }
    });
  }

  /** R3. */
  #replace(group: string, call: GroupCall): void {
    const before = this.#groups.get(group);
    this.#groups.set(group, call);
    if (before !== undefined) this.#end(before, new Refusal(status.ABORTED, "the group has opened another stream"));
  }

  /** R2. Throws Refusal. */
  #speakerOf(report: GroupReport, caller: Identity | undefined): Speaker {
    const { namespace, group: name, incarnation, podUid, rankEpochs } = report;
    nameOf("namespace", namespace);
    nameOf("group", name);
    if (rankEpochs.length > RANKS_MAX)
      throw new Refusal(status.INVALID_ARGUMENT, `rank_epochs: ${rankEpochs.length} ranks, at most ${RANKS_MAX}`);
    if (caller !== undefined && caller.podUid !== podUid)
      throw new Refusal(status.PERMISSION_DENIED, `pod_uid: the certificate is of pod ${caller.podUid}, not ${podUid}`);
    const lead = this.#lead;
    if (lead === undefined) throw notLeading();
    const { groups, pods } = lead.stores;
    const group = `${namespace}/${name}`;
    const object = groups.get(group);
    if (object === undefined) throw new Refusal(status.FAILED_PRECONDITION, `group: there is no ReplicaGroup ${group}`);
    const read = groupOf(object);
    const record = recordOf(read);
    if (!record.begun || record.incarnation !== incarnation) {
      const is = record.begun ? `is at ${record.incarnation}` : `has ended all before ${record.incarnation}`;
      throw new Refusal(status.FAILED_PRECONDITION, `incarnation: ${group} ${is}, this is ${incarnation}`);
    }
    const leader = pods.ownedBy(object.metadata.uid ?? "").find((each) => podFacts(each).uid === podUid);
    const gang = leader === undefined ? undefined : gangPod(leader);
    if (gang?.worker !== 0 || gang.incarnation !== incarnation)
      throw new Refusal(status.FAILED_PRECONDITION, `pod_uid: ${podUid} is not the leader's pod of ${group}`);
    return { group, incarnation, owner: read.spec.owner };
  }

  // ---- gateways ----

  #demand(call: DemandCall): void {
    if (!this.#begin(call, this.#demands, DEMAND_STREAMS_MAX)) return;
    this.#demands += 1;
    const { loads } = this.#options;
    const stream = loads.open();
    const leave = this.#leaving(call, () => {
      this.#demands -= 1;
      stream.close();
    });
    call.on("data", (report: DemandReport) => {
      if (!this.#calls.has(call)) return;
      try {
        expectRole(call, "gateway");
        if (report.models.length > MODELS_MAX)
          throw new Refusal(status.INVALID_ARGUMENT, `models: ${report.models.length}, at most ${MODELS_MAX}`);
        for (const { namespace, deployment } of report.models) {
          nameOf("models.namespace", namespace);
          nameOf("models.deployment", deployment);
        }
        stream.hear(report.models);
        take(call);
      } catch (error) {
        leave();
        this.#end(call, refusalOf(error));
      }
    });
  }

  // ---- inspect pods ----

  async #inspect(call: InspectedCall, callback: sendUnaryData<ReportTaken>): Promise<void> {
    const refuse = (error: unknown) => {
      const { code, message } = refusalOf(error);
      callback({ code, details: message });
    };
    if (this.#lead === undefined) return refuse(notLeading());
    if (this.#inspected >= INSPECTED_STREAMS_MAX) return refuse(tooMany(INSPECTED_STREAMS_MAX));
    const { inspections = notAsked } = this.#options;
    this.#inspected += 1;
    this.#calls.add(call);
    try {
      const parts: AsyncIterable<InspectedPart> = call;
      for await (const part of parts) {
        if (this.#lead === undefined) throw notLeading();
        expectRole(call, "inspect", `${part.namespace}/${part.inspection}`);
        await inspections.take(part);
      }
      callback(null, {});
    } catch (error) {
      refuse(error);
    } finally {
      this.#inspected -= 1;
      this.#calls.delete(call);
    }
  }

  // ---- streams ----

  #begin(call: GroupCall | DemandCall, open: number, most: number): boolean {
    const refusal = this.#lead === undefined ? notLeading() : open >= most ? tooMany(most) : undefined;
    if (refusal === undefined) this.#calls.add(call);
    else this.#end(call, refusal);
    return refusal === undefined;
  }

  /** Calls `left` once, whichever way the stream ends. Answers how to do it now. */
  #leaving(call: GroupCall | DemandCall, left: () => void): () => void {
    const leave = () => {
      if (this.#calls.delete(call)) left();
    };
    call.on("end", () => {
      leave();
      call.end();
    });
    call.on("cancelled", leave);
    call.on("error", leave);
    return leave;
  }

  #end(call: AnyCall, { code, message }: Refusal): void {
    this.#options.metrics?.count("muster_reports_refused_total", { code: String(code) });
    call.emit("error", Object.assign(new Error(message), { code, details: message }));
    this.#calls.delete(call);
  }
}

/** Of whom this stream is; `title`: of its pod. In clear, on one machine, anybody is believed. */
function expectRole(call: DemandCall | InspectedCall, role: Role, title?: string): void {
  const caller = callerOf(call);
  if (caller === undefined) return;
  const is = `${caller.namespace}/${caller.name}`;
  if (caller.role === role && (title === undefined || title === is)) return;
  throw new Refusal(
    status.PERMISSION_DENIED,
    `this is for ${role} ${title ?? ""} to say, not for ${caller.role} ${is}`,
  );
}

/** R4. */
function take(call: GroupCall | DemandCall): void {
  if (call.writableLength === 0) call.write({});
}

function nameOf(field: string, value: string): void {
  if (value !== "" && value.length <= NAME_MAX) return;
  throw new Refusal(status.INVALID_ARGUMENT, `${field}: ${value === "" ? "is needed" : `is longer than ${NAME_MAX}`}`);
}

const notLeading = (): Refusal => new Refusal(status.UNAVAILABLE, "this controller does not lead: look for it again");
const tooMany = (most: number): Refusal => new Refusal(status.RESOURCE_EXHAUSTED, `${most} streams are open already`);

function refusalOf(error: unknown): Refusal {
  if (error instanceof Refusal) return error;
  return new Refusal(status.INTERNAL, error instanceof Error ? error.message : String(error));
}

/** Listens for reports; rejects where it cannot. */
export async function listenReports(
  reports: Reports,
  { listen, trust = noTrust }: { listen: string; trust?: Trust },
): Promise<{ port: number; close(): void }> {
  const server = new Server(channelOptions);
  server.addService(ReportsService, reports.service);
  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync(listen, trust.server(["worker", "gateway", "inspect"]), (error, bound) =>
      error === null ? resolve(bound) : reject(new Error(`--listen: cannot listen on ${listen}: ${error.message}`)),
    ),
  );
  return { port, close: () => server.forceShutdown() };
}
