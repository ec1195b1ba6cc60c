// Looks at sources by pods, and keeps what they have read. Owns the life of inspect pods of one term; what a source needs one
// for, and what its bytes mean, is source-looks.ts and controller/model.
//
//   J1  a source of an owner has at most one pod; at most PODS_MAX are under way; each ends within INSPECT_SECONDS.
//   J2  a part counts only where namespace, name and UID are those of a pod that is under way: anything else is refused.
//   J3  what is kept is bounded in bytes and number, and lives for KEPT_MS; the longest unused goes first. Lost with the term.
//   J4  a failure is said, and tried again with back-off; a source that is wrong is tried again as seldom.
import { FaultError, lost, waiting } from "../../../proto/fault.ts";
import type { InspectedPart } from "../../../proto/gen/muster/v1/report.ts";
import { type Fault, Fault_Kind } from "../../../proto/gen/muster/v1/worker.ts";
import type { Recording } from "../../model/sources/recorded.ts";
import { isNotFound, type KubeApi, type KubeObject, keyOf } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { backoffMs } from "../api/rate-limit.ts";
import { pods as podResource } from "../api/resources.ts";
import { podState } from "../groups/pod-state.ts";
import type { WorkerTemplate } from "../groups/pods.ts";
import type { Store } from "../watch/store.ts";
import { INSPECT_SECONDS, type InspectOrder, type InspectTarget, inspectPod, inspectPodName } from "./inspect-pod.ts";
import { RecordingParts } from "./recording-parts.ts";

export type Inspected =
  | { kind: "ready"; recording: Recording }
  | { kind: "waiting"; text: string }
  /** Tried again at `againMs`. */
  | { kind: "failed"; text: string; againMs: number }
  | { kind: "refused"; fault: Fault; againMs: number };

export type InspectionLimits = { podsMax: number; keptMax: number; keptBytesMax: number; keptMs: number };

const PODS_MAX = 8;
const KEPT_MAX = 128;
const KEPT_BYTES_MAX = 256 * 1024 * 1024;
const KEPT_MS = 3_600_000;
const BACKOFF = { baseMs: 5_000, maxMs: 600_000 };
/** For the one before it to go. */
const GONE_MS = 60_000;
const GONE_POLL_MS = 500;
/** Beyond the pod's own bound: for the kubelet and the watch. */
const SLACK_MS = 30_000;

export type InspectionsOptions = {
  api: KubeApi;
  pods: Store;
  clock: Clock;
  random: () => number;
  template: WorkerTemplate;
  target: InspectTarget;
  /** What is known of a source of this owner has changed. */
  onChange: (owner: KubeObject) => void;
  limits?: Partial<InspectionLimits>;
};

type Entry = {
  order: InspectOrder;
  /** Another one asks anew. */
  token: string;
  uid: string;
  parts: RecordingParts | undefined;
  told: Extract<Inspected, { kind: "failed" | "refused" }> | undefined;
  kept: { recording: Recording; bytes: number; atMs: number; token: string } | undefined;
  usedMs: number;
  failures: number;
  running: Promise<void> | undefined;
  bell: AbortController;
};

export class Inspections {
  readonly #options: InspectionsOptions;
  readonly #limits: InspectionLimits;
  readonly #signal: AbortSignal;
  /** By "namespace/pod". */
  readonly #entries = new Map<string, Entry>();
  readonly #unsubscribe: () => void;

  constructor(options: InspectionsOptions, signal: AbortSignal) {
    this.#options = options;
    this.#limits = {
      podsMax: PODS_MAX,
      keptMax: KEPT_MAX,
      keptBytesMax: KEPT_BYTES_MAX,
      keptMs: KEPT_MS,
      ...options.limits,
    };
    this.#signal = signal;
    this.#unsubscribe = options.pods.subscribe(({ object }) => this.#entries.get(keyOf(object))?.bell.abort());
  }

  /**
   * What is known of the source; sends a pod where nothing is. `token`: of what is asked, so that a new question looks anew;
   * undefined takes what an earlier question has found.
   */
  lookAt(order: InspectOrder, token?: string): Inspected {
    const nowMs = this.#options.clock.nowMs();
    const { namespace = "" } = order.owner.metadata;
    const entry = this.#entryOf(`${namespace}/${inspectPodName(order)}`, order, token);
    entry.order = order;
    entry.usedMs = nowMs;
    const { told } = entry;
    const kept = entry.kept ?? (token === undefined ? this.#alias(order) : undefined);
    if (kept !== undefined && (token ?? kept.token) === kept.token && nowMs - kept.atMs < this.#limits.keptMs)
      return { kind: "ready", recording: kept.recording };
    if (entry.running !== undefined) return { kind: "waiting", text: this.#whereIs(entry) };
    if (told !== undefined && told.againMs > nowMs) return told;
    const running = [...this.#entries.values()].filter((each) => each.running !== undefined).length;
    if (running >= this.#limits.podsMax)
      return { kind: "failed", text: `${running} other sources are being looked at`, againMs: nowMs + BACKOFF.baseMs };
    entry.running = this.#run(entry).finally(() => {
      entry.running = undefined;
      if (!this.#signal.aborted) this.#options.onChange(entry.order.owner);
    });
    return { kind: "waiting", text: `pod ${inspectPodName(order)} is being made: it looks at the source` };
  }

  /** A part of what a pod has read. Throws FaultError: the pod is to end then. */
  take(part: InspectedPart): void {
    const entry = this.#entries.get(`${part.namespace}/${part.inspection}`);
    if (entry?.parts === undefined || entry.uid === "" || entry.uid !== part.podUid)
      throw new FaultError(lost("inspection_unknown", `nobody waits for pod ${part.namespace}/${part.inspection}`));
    const building = [...this.#entries.values()].reduce((sum, { parts }) => sum + (parts?.bytes ?? 0), 0);
    if (building > this.#limits.keptBytesMax)
      throw new FaultError(waiting("inspections_full", `${building} bytes of headers are on their way already`));
    const said = entry.parts.take(part);
    if (said.kind === "more") return;
    if (said.kind === "failed") this.#refuse(entry, said.fault);
    else this.#keep(entry, said.recording, entry.parts.bytes);
    entry.parts = undefined;
    entry.bell.abort();
  }

  /** Resolves when nothing is under way; the signal has been aborted before. */
  async idle(): Promise<void> {
    this.#unsubscribe();
    await Promise.all([...this.#entries.values()].map(({ running }) => running));
    this.#entries.clear();
  }

  /** A plan names its source by what the place called itself; the pod was sent for what its owner wrote. */
  #alias({ owner, source }: InspectOrder): Entry["kept"] {
    const own = [...this.#entries.values()].filter(({ order }) => order.owner.metadata.uid === owner.metadata.uid);
    return own.find(({ kept }) => kept?.recording.url === source.url)?.kept;
  }

  #entryOf(key: string, order: InspectOrder, token: string | undefined): Entry {
    const known = this.#entries.get(key);
    const isSame = known?.order.owner.metadata.uid === order.owner.metadata.uid;
    if (known !== undefined && isSame) {
      if (token !== undefined && token !== known.token) {
        known.token = token;
        known.told = undefined;
        known.failures = 0;
      }
      return known;
    }
    const made: Entry = {
      ...{ order, token: token ?? "", uid: "", parts: undefined, told: undefined, kept: undefined },
      ...{ usedMs: 0, failures: 0, running: undefined, bell: new AbortController() },
    };
    this.#entries.set(key, made);
    this.#forget(made);
    return made;
  }

  /** J3. */
  #forget(newest: Entry): void {
    const { keptMax, keptBytesMax } = this.#limits;
    const bytes = () => [...this.#entries.values()].reduce((sum, { kept }) => sum + (kept?.bytes ?? 0), 0);
    const oldest = [...this.#entries].toSorted(([, one], [, other]) => one.usedMs - other.usedMs);
    for (const [key, entry] of oldest) {
      if (this.#entries.size <= keptMax && bytes() <= keptBytesMax) return;
      if (entry !== newest && entry.running === undefined) this.#entries.delete(key);
    }
  }

  #keep(entry: Entry, recording: Recording, bytes: number): void {
    entry.kept = { recording, bytes, atMs: this.#options.clock.nowMs(), token: entry.token };
    entry.told = undefined;
    entry.failures = 0;
    this.#forget(entry);
  }

  #refuse(entry: Entry, fault: Fault): void {
    const againMs = this.#againMs(entry);
    const text = fault.field === "" ? fault.detail : `${fault.field}: ${fault.detail}`;
    entry.told =
      fault.kind === Fault_Kind.INVALID ? { kind: "refused", fault, againMs } : { kind: "failed", text, againMs };
  }

  #fail(entry: Entry, text: string): void {
    entry.told = { kind: "failed", text, againMs: this.#againMs(entry) };
  }

  #againMs(entry: Entry): number {
    const { clock, random } = this.#options;
    entry.failures += 1;
    return clock.nowMs() + backoffMs(entry.failures, BACKOFF, random);
  }

  #whereIs({ order }: Entry): string {
    const name = inspectPodName(order);
    const pod = this.#options.pods.get(`${order.owner.metadata.namespace ?? ""}/${name}`);
    const state = pod === undefined ? undefined : podState(pod);
    if (state?.kind === "pending") return `to look at the source, ${state.cause.text}`;
    return `pod ${name} looks at the source`;
  }

  // ---- one pod ----

  async #run(entry: Entry): Promise<void> {
    const { api } = this.#options;
    const signal = this.#signal;
    let made: KubeObject | undefined;
    try {
      const object = inspectPod(entry.order, this.#options.template, this.#options.target);
      if (!(await this.#cleared(entry, object))) return;
      made = await api.create(podResource, object, signal);
      this.#options.pods.learn(made);
      entry.uid = made.metadata.uid ?? "";
      entry.parts = new RecordingParts();
      await this.#ended(entry, made);
    } catch (error) {
      if (signal.aborted) return;
      this.#fail(entry, error instanceof Error ? error.message : String(error));
    } finally {
      entry.uid = "";
      entry.parts = undefined;
      if (made !== undefined) await this.#delete(made).catch(() => {}); // its owner's end, or the next look, takes it away
    }
  }

  /** Nothing of that name is there any more; false where that has been said. */
  async #cleared(entry: Entry, { metadata }: KubeObject): Promise<boolean> {
    const { api, clock } = this.#options;
    const { name, namespace } = metadata;
    const untilMs = clock.nowMs() + GONE_MS;
    while (!this.#signal.aborted) {
      const there = await api.get(podResource, name, namespace, this.#signal);
      if (there === undefined) return true;
      const isOurs = there.metadata.ownerReferences?.some(({ uid }) => uid === entry.order.owner.metadata.uid) ?? false;
      if (!isOurs || clock.nowMs() >= untilMs) {
        this.#fail(
          entry,
          `a pod ${name} ${isOurs ? "of an earlier look does not end" : "of another owner is in its place"}`,
        );
        return false;
      }
      if (there.metadata.deletionTimestamp === undefined) await this.#delete(there);
      await clock.sleep(this.#signal, clock.nowMs() + GONE_POLL_MS);
    }
    return false;
  }

  /** Until all has come, the pod has ended, or its time is over. */
  async #ended(entry: Entry, made: KubeObject): Promise<void> {
    const { clock, pods } = this.#options;
    const untilMs = clock.nowMs() + INSPECT_SECONDS * 1000 + SLACK_MS;
    while (!this.#signal.aborted && entry.parts !== undefined) {
      entry.bell = new AbortController();
      const pod = pods.get(keyOf(made));
      if (pod === undefined || pod.metadata.uid !== made.metadata.uid)
        return this.#fail(entry, `pod ${made.metadata.name} has gone before it said what it found`);
      const state = podState(pod);
      if (state.kind === "ended") {
        const how = state.signal ?? `code ${state.code ?? "unknown"}`;
        return this.#fail(entry, `pod ${made.metadata.name} ended with ${how}: ${state.detail}`);
      }
      if (clock.nowMs() >= untilMs)
        return this.#fail(entry, `${this.#whereIs(entry)}; it has not ended in ${INSPECT_SECONDS / 60} minutes`);
      this.#options.onChange(entry.order.owner);
      await clock.sleep(AbortSignal.any([this.#signal, entry.bell.signal]), untilMs);
    }
  }

  async #delete({ metadata }: KubeObject): Promise<void> {
    const { name, namespace, uid } = metadata;
    const preconditions = uid === undefined ? {} : { uid };
    try {
      const options = { preconditions, gracePeriodSeconds: 0 };
      await this.#options.api.delete(podResource, name, namespace, options, this.#signal);
    } catch (error) {
      if (!isNotFound(error)) throw error;
    }
  }
}

/** Where parts come in, whoever's term it is: a server outlives terms. */
export class InspectionsDoor {
  #now: Inspections | undefined;

  open(inspections: Inspections): void {
    this.#now = inspections;
  }

  close(): void {
    this.#now = undefined;
  }

  /** Rejects with FaultError where nobody asked for it. */
  async take(part: InspectedPart): Promise<void> {
    if (this.#now === undefined) throw new FaultError(lost("not_leading", "this controller does not lead"));
    this.#now.take(part);
  }
}
