// Who leads: one holder of a Lease of coordination.k8s.io at a time. Owns the Lease; what leading means is the caller's.
//
//   E1  a term is held until `renewMs` after the last successful renewal was *sent*; others wait `leaseMs` after they have
//       *seen* it. With leaseMs > renewMs no two hold at once, however far apart their clocks are set, while their clocks
//       run at rates within leaseMs / renewMs of each other.
//   E2  the holder's times are never compared with one's own clock: only whether the Lease has changed since one last looked.
//   E3  each term has a fence greater than all fences before it: the version of the write that began it.
//   E4  the Lease is given back only after the work of the term has ended.
//   E5  a process that was paused finds out by its own clock before it acts (`isHeld`); what it had on the way already is
//       refused by the versions it names (FencedApi): whoever leads now has written there since, or will read it.
import { isAlreadyThere, isConflict, isNotFound, type KubeApi, KubeError, type KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { leases } from "../api/resources.ts";
import { isRecord, microTimeOf } from "../api/wire.ts";
import type { KubeMetrics } from "../metrics/metrics.ts";

export type LeaseTimes = { leaseMs: number; renewMs: number; retryMs: number };

/** In the proportions that the leader elections of Kubernetes have. */
export const leaseTimesOf = (leaseMs: number): LeaseTimes => ({
  leaseMs,
  renewMs: (leaseMs * 2) / 3,
  retryMs: (leaseMs * 2) / 15,
});

export const defaultLeaseTimes: LeaseTimes = leaseTimesOf(15_000);

export type Term = {
  /** Greater than that of any term before (E3). */
  readonly fence: bigint;
  /** How often the holder has changed, for people. */
  readonly transitions: number;
  /** Aborts when the term is lost or the work is asked to end. */
  readonly signal: AbortSignal;
  /** To be asked right before each act (E5). */
  isHeld(): boolean;
};

export type ElectorOptions = {
  api: KubeApi;
  clock: Clock;
  random: () => number;
  namespace: string;
  name: string;
  /** Of this process and no other, ever: pod name and a random part. */
  identity: string;
  times?: LeaseTimes;
  metrics?: KubeMetrics;
};

/** "lost": somebody else may lead now; "done": the work ended by itself; "stopped": asked to before or while leading. */
export type TermEnd = "lost" | "done" | "stopped";

type LeaseSpec = { holder: string; transitions: number; leaseMs: number; acquireTime: string };
type Held = { lease: KubeObject; untilMs: number };

export class LeaderElector {
  readonly #options: ElectorOptions;
  readonly #times: LeaseTimes;
  /** The Lease of others as last seen, and when by our clock (E2). */
  #observed: { version: string; atMs: number } | undefined;
  #holder = "";

  constructor(options: ElectorOptions) {
    this.#options = options;
    this.#times = options.times ?? defaultLeaseTimes;
    if (this.#times.renewMs >= this.#times.leaseMs || this.#times.retryMs >= this.#times.renewMs) {
      throw new Error("lease times: retryMs < renewMs < leaseMs is needed");
    }
  }

  /** Who held it when last looked at; empty: nobody, or not known. */
  get holder(): string {
    return this.#holder;
  }

  /** Waits for the Lease, does the work, keeps it meanwhile, gives it back. Rejects with what the work rejects with. */
  async lead(work: (term: Term) => Promise<void>, signal: AbortSignal): Promise<TermEnd> {
    const held = await this.#campaign(signal);
    if (held === undefined) return "stopped";
    const { metrics } = this.#options;
    metrics?.count("muster_leader_changes_total");
    const unmeter = metrics?.gauge("muster_leader", {}, () => 1);
    const term = new HeldTerm(held, this.#options.clock, signal);
    const finished = new AbortController();
    const kept = this.#keep(term, finished.signal);
    try {
      await work(term);
    } finally {
      finished.abort();
      await kept;
      const wasHeld = term.isHeld();
      term.end();
      unmeter?.();
      if (wasHeld) await this.#giveBack(term);
    }
    if (term.isLost) return "lost";
    return signal.aborted ? "stopped" : "done";
  }

  async #campaign(signal: AbortSignal): Promise<Held | undefined> {
    const { clock, random } = this.#options;
    while (!signal.aborted) {
      try {
        const held = await this.#withDeadline(this.#times.renewMs, signal, (limited) => this.#tryTake(limited));
        // An answer that came after its time (a pause) begins no term: another may have begun one since.
        if (held !== undefined && clock.nowMs() < held.untilMs) return held;
      } catch (error) {
        if (!signal.aborted && !(error instanceof KubeError)) throw error;
      }
      await clock.sleep(signal, clock.nowMs() + this.#times.retryMs * (0.9 + random() * 0.2));
    }
    return undefined;
  }

  async #tryTake(signal: AbortSignal): Promise<Held | undefined> {
    const { api, clock, namespace, name, identity } = this.#options;
    const lease = await api.get(leases, name, namespace, signal);
    const spec = specOf(lease);
    this.#holder = spec.holder;
    const version = `${lease?.metadata.uid} ${lease?.metadata.resourceVersion}`;
    if (this.#observed?.version !== version) this.#observed = { version, atMs: clock.nowMs() };
    const isOthers = spec.holder !== "" && spec.holder !== identity;
    if (isOthers && clock.nowMs() < this.#observed.atMs + Math.max(spec.leaseMs, this.#times.leaseMs)) return undefined;
    const sentMs = clock.nowMs();
    try {
      const taken = await this.#write(lease, { ...spec, transitions: spec.transitions + (isOthers ? 1 : 0) }, signal);
      this.#holder = identity;
      return { lease: taken, untilMs: sentMs + this.#times.renewMs };
    } catch (error) {
      if (isConflict(error) || isAlreadyThere(error) || isNotFound(error)) return undefined;
      throw error;
    }
  }

  /** Renews until the work has ended or the term is lost. */
  async #keep(term: HeldTerm, finished: AbortSignal): Promise<void> {
    const { clock } = this.#options;
    const never = new AbortController().signal;
    let sentMs = clock.nowMs();
    while (!finished.aborted && term.isHeld()) {
      // From when the last was sent, not answered: slow answers leave no less time for the next.
      await clock.sleep(finished, Math.min(sentMs + this.#times.retryMs, term.untilMs));
      if (finished.aborted || !term.isHeld()) break;
      try {
        sentMs = clock.nowMs();
        const leftMs = term.untilMs - sentMs;
        // Not cut short when the work ends: a renewal that is on its way decides which version can be given back.
        await this.#withDeadline(leftMs, never, (limited) => this.#renew(term, limited));
      } catch (error) {
        if (!(error instanceof KubeError)) throw error;
      }
    }
    if (!finished.aborted) term.lose();
  }

  async #renew(term: HeldTerm, signal: AbortSignal): Promise<void> {
    const { api, clock, namespace, name, identity } = this.#options;
    const sentMs = clock.nowMs();
    try {
      term.renewed(await this.#write(term.lease, specOf(term.lease), signal), sentMs + this.#times.renewMs);
    } catch (error) {
      if (!isConflict(error) && !isNotFound(error)) throw error;
      const lease = await api.get(leases, name, namespace, signal);
      this.#holder = specOf(lease).holder;
      // Ours still: an answer of ours was lost, or somebody edited it. The next renewal is sent with the version seen now.
      if (lease !== undefined && this.#holder === identity) term.renewed(lease, term.untilMs);
      else term.lose();
    }
  }

  /** With the version of the lease it replaces, so that of two that try one is refused. */
  async #write(lease: KubeObject | undefined, spec: LeaseSpec, signal: AbortSignal): Promise<KubeObject> {
    const { api, clock, namespace, name, identity } = this.#options;
    const now = microTimeOf(clock.nowMs());
    const next = {
      apiVersion: "coordination.k8s.io/v1",
      kind: "Lease",
      metadata: lease?.metadata ?? { name, namespace },
      spec: {
        holderIdentity: identity,
        leaseDurationSeconds: Math.ceil(this.#times.leaseMs / 1000),
        acquireTime: spec.holder === identity && spec.acquireTime !== "" ? spec.acquireTime : now,
        renewTime: now,
        leaseTransitions: spec.transitions,
      },
    };
    return lease === undefined ? api.create(leases, next, signal) : api.replace(leases, next, signal);
  }

  /** So that the next one need not wait; where it fails it waits. */
  async #giveBack(term: HeldTerm): Promise<void> {
    const { api } = this.#options;
    const { lease } = term;
    const spec = { ...(isRecord(lease.spec) ? lease.spec : {}), holderIdentity: "", leaseDurationSeconds: 1 };
    try {
      const never = new AbortController().signal;
      await this.#withDeadline(this.#times.retryMs, never, (limited) =>
        api.replace(leases, { ...lease, spec }, limited),
      );
      this.#holder = "";
    } catch (error) {
      if (!(error instanceof KubeError)) throw error;
    }
  }

  async #withDeadline<T>(ms: number, signal: AbortSignal, work: (limited: AbortSignal) => Promise<T>): Promise<T> {
    const { clock } = this.#options;
    const late = new AbortController();
    const done = new AbortController();
    void clock.sleep(done.signal, clock.nowMs() + ms).then(() => {
      if (!done.signal.aborted)
        late.abort(new KubeError(0, "Timeout", `the lease was not answered for within ${ms} ms`));
    });
    try {
      return await work(AbortSignal.any([signal, late.signal]));
    } finally {
      done.abort();
    }
  }
}

class HeldTerm implements Term {
  readonly fence: bigint;
  readonly transitions: number;
  lease: KubeObject;
  untilMs: number;
  isLost = false;
  readonly #clock: Clock;
  readonly #stop = new AbortController();
  readonly #unlink: () => void;

  constructor(held: Held, clock: Clock, signal: AbortSignal) {
    this.lease = held.lease;
    this.untilMs = held.untilMs;
    this.fence = fenceOf(held.lease);
    this.transitions = specOf(held.lease).transitions;
    this.#clock = clock;
    const onAbort = () => this.#stop.abort(signal.reason);
    signal.addEventListener("abort", onAbort, { once: true });
    this.#unlink = () => signal.removeEventListener("abort", onAbort);
    if (signal.aborted) onAbort();
  }

  get signal(): AbortSignal {
    return this.#stop.signal;
  }

  isHeld(): boolean {
    return !this.isLost && this.#clock.nowMs() < this.untilMs;
  }

  renewed(lease: KubeObject, untilMs: number): void {
    this.lease = lease;
    this.untilMs = untilMs;
  }

  lose(): void {
    this.isLost = true;
    this.#stop.abort(new KubeError(0, "NotLeader", "the lease was lost: somebody else may lead now"));
  }

  end(): void {
    if (this.#clock.nowMs() >= this.untilMs) this.isLost = true;
    this.#unlink();
    this.#stop.abort(new KubeError(0, "NotLeader", "the term has ended"));
  }
}

function fenceOf(lease: KubeObject): bigint {
  const version = lease.metadata.resourceVersion ?? "";
  if (!/^\d+$/.test(version)) {
    throw new KubeError(0, "BadReply", `lease ${lease.metadata.name}: resourceVersion "${version}" is no number`);
  }
  return BigInt(version);
}

/** Times come as strings, whatever a typed client says; absent fields are those of a Lease that nobody has held. */
function specOf(lease: KubeObject | undefined): LeaseSpec {
  const spec = isRecord(lease?.spec) ? lease.spec : {};
  const { holderIdentity, leaseTransitions, leaseDurationSeconds, acquireTime } = spec;
  return {
    holder: typeof holderIdentity === "string" ? holderIdentity : "",
    transitions: typeof leaseTransitions === "number" ? leaseTransitions : 0,
    leaseMs: typeof leaseDurationSeconds === "number" ? leaseDurationSeconds * 1000 : 0,
    acquireTime: typeof acquireTime === "string" ? acquireTime : "",
  };
}
