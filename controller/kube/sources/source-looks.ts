// How the controller comes to know what an owner's source holds: it reads the headers itself, or has a pod look. Owns which of
// the two, what a claim's volume means for where a group may be, and how what is not known yet is said.
//
//   L1  a claim, a path of pods and a source with a secret are looked at by pods alone; the controller reads no user's Secret.
//   L2  a claim that is not there, or that so many workers cannot mount, is Infeasible, and looked at again.
import { FaultError, invalid, transient } from "../../../proto/fault.ts";
import type { ModelSpec } from "../../../proto/gen/muster/v1/plan.ts";
import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import { readModel } from "../../model/model.ts";
import { type Recording, recordedSource } from "../../model/sources/recorded.ts";
import type { Inventory } from "../../plan/hardware.ts";
import type { Grounds } from "../../reconcile/deployment/planning.ts";
import type { Question } from "../../reconcile/deployment/wish.ts";
import type { Answer } from "../../reconcile/deployment/world.ts";
import { type KubeApi, KubeError, type KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { orderOf } from "../groups/group-wishes.ts";
import type { Store } from "../watch/store.ts";
import { FILE_MEANS, fileFault } from "./inspect-pod.ts";
import type { Inspections } from "./inspections.ts";
import type { PodSource } from "./pod-source.ts";
import { type ClaimFacts, claimOf, isReachable, modeFault, type NodeTerm, readClaim, termsText } from "./volumes.ts";

export type Look =
  /** `grounds`: without nodes that the volume does not reach. */
  { kind: "ready"; recording: Recording; grounds: Grounds; volume: readonly NodeTerm[] } | NotYet;
/** Looked at again at `againMs`, or earlier where something changes. */
type NotYet = { kind: "not"; answer: Answer; againMs: number };

export type SourceLooksOptions = {
  api: KubeApi;
  nodes: Store;
  clock: Clock;
  /** Undefined where the controller has no address that pods can report to. */
  inspections: Inspections | undefined;
};

type Claim = { facts: ClaimFacts | undefined; text: string; atMs: number; isReading: boolean };

const CLAIM_FRESH_MS = 30_000;
const CLAIMS_MAX = 1_000;
const AGAIN_MS = 15_000;

export const needsPod = ({ url, secret }: PodSource): boolean => secret !== undefined || /^(pvc|file):\/\//.test(url);

export class SourceLooks {
  readonly #options: SourceLooksOptions;
  readonly #signal: AbortSignal;
  /** By "namespace/claim". */
  readonly #claims = new Map<string, Claim>();

  readonly #listeners = new Set<(owner: KubeObject) => void>();

  constructor(options: SourceLooksOptions, signal: AbortSignal) {
    this.#options = options;
    this.#signal = signal;
  }

  /** Told each time something is learnt of what lies where an owner's source is. */
  subscribe(listener: (owner: KubeObject) => void): void {
    this.#listeners.add(listener);
  }

  changed(owner: KubeObject): void {
    for (const listener of this.#listeners) listener(owner);
  }

  /** For planning, of sources that need a pod: what is found is kept under the question. */
  lookFor(owner: KubeObject, question: Question, all: Grounds): Look {
    const { source, plan, replicas, hash } = question;
    const claim = this.#claimOf(owner, source.url, { workers: plan.pins.workers ?? 1, replicas });
    if (claim.kind === "not") return claim;
    const { volume } = claim;
    const grounds = { free: this.#reached(all.free, volume), all: this.#reached(all.all, volume) };
    const nodes = grounds.all.nodes.map(({ name }) => name);
    if (nodes.length === 0) return nowhere(source.url, volume, this.#againMs());
    const seen = this.#inspected(owner, source, { nodes, token: hash });
    return seen.kind === "not" ? seen : { ...seen, grounds, volume };
  }

  /** Nodes that the volume of a source reaches, as far as it is known; empty: all. */
  volumeOf(namespace: string | undefined, url: string): readonly NodeTerm[] {
    const claim = claimOrNone(url);
    const facts = claim === undefined ? undefined : this.#claims.get(`${namespace ?? ""}/${claim}`)?.facts;
    return facts?.kind === "bound" ? facts.terms : [];
  }

  /** The model of a stored plan, headers alone. Rejects with FaultError: TRANSIENT while a pod has not looked yet. */
  async read(url: string, owner: KubeObject | undefined, signal: AbortSignal): Promise<ModelSpec> {
    const options = { headersOnly: true, tokenizer: true, signal };
    const order = owner === undefined ? undefined : orderOf(owner);
    const source = { url, secret: url.startsWith("builtin://") ? undefined : order?.pods.source?.secret };
    if (!needsPod(source)) return readModel(url, options);
    if (owner === undefined) throw new FaultError(transient("owner_missing", "its owner is not there", "spec.owner"));
    const claim = claimOrNone(url);
    if (claim !== undefined) await this.#readClaim(owner, claim);
    const look = this.#inspected(owner, source, { nodes: [] });
    if (look.kind === "ready") return readModel(url, { ...options, place: recordedSource(look.recording) });
    if (look.answer.kind === "refused") throw new FaultError(look.answer.fault);
    const detail = look.answer.kind === "failed" ? look.answer.detail : "no pod can look at the source now";
    throw new FaultError(transient("not_looked_at", detail, "spec.model.source"));
  }

  #inspected(
    owner: KubeObject,
    source: PodSource,
    { nodes, token }: { nodes: readonly string[]; token?: string },
  ): { kind: "ready"; recording: Recording } | NotYet {
    const { inspections } = this.#options;
    const order = orderOf(owner);
    if (order === undefined) return failed(`${owner.kind} ${owner.metadata.name} cannot be read`, this.#againMs());
    const wrong = fileFault(source.url);
    if (wrong !== undefined) return refused(wrong, this.#againMs());
    if (inspections === undefined) {
      const detail = `${source.url} can be looked at by pods only, and this controller has no address for them`;
      return refused(`${detail}: start it with --listen and --advertise`, this.#againMs());
    }
    const seen = inspections.lookAt({ owner, source, pods: order.pods, nodes }, token);
    switch (seen.kind) {
      case "ready":
        return seen;
      case "waiting":
        return failed(seen.text, this.#againMs());
      case "failed":
        return failed(seen.text, seen.againMs);
      default:
        return {
          kind: "not",
          answer: { kind: "refused", fault: atSource(seen.fault, source.url) },
          againMs: seen.againMs,
        };
    }
  }

  #againMs(): number {
    return this.#options.clock.nowMs() + AGAIN_MS;
  }

  // ---- claims ----

  #reached({ nodes }: Inventory, volume: readonly NodeTerm[]): Inventory {
    const labelsOf = (name: string) => this.#options.nodes.get(name)?.metadata.labels ?? {};
    return { nodes: nodes.filter(({ name }) => isReachable(volume, { name, labels: labelsOf(name) })) };
  }

  #claimOf(
    owner: KubeObject,
    url: string,
    use: { workers: number; replicas: number },
  ): { kind: "known"; volume: readonly NodeTerm[] } | NotYet {
    let claim: string | undefined;
    try {
      claim = claimOf(url);
    } catch (error) {
      return refused(error instanceof Error ? error.message : String(error), this.#againMs());
    }
    if (claim === undefined) return { kind: "known", volume: [] };
    const known = this.#claims.get(`${owner.metadata.namespace ?? ""}/${claim}`);
    if (known === undefined || this.#options.clock.nowMs() - known.atMs >= CLAIM_FRESH_MS)
      void this.#readClaim(owner, claim);
    const facts = known?.facts;
    if (facts === undefined) return failed(known?.text || `claim ${claim} is being looked at`, this.#againMs());
    const fault = modeFault(facts, claim, use);
    if (fault !== undefined) return refused(fault, this.#againMs());
    return { kind: "known", volume: facts.kind === "bound" ? facts.terms : [] };
  }

  /** One at a time for each; never rejects. */
  async #readClaim(owner: KubeObject, claim: string): Promise<void> {
    const { api, clock } = this.#options;
    const { namespace = "" } = owner.metadata;
    const key = `${namespace}/${claim}`;
    const known = this.#claims.get(key) ?? { facts: undefined, text: "", atMs: 0, isReading: false };
    if (known.isReading) return;
    if (this.#claims.size >= CLAIMS_MAX) this.#claims.clear();
    this.#claims.set(key, { ...known, isReading: true });
    let next: Claim;
    try {
      const facts = await readClaim(api, { namespace, claim }, this.#signal);
      next = { facts, text: "", atMs: clock.nowMs(), isReading: false };
    } catch (error) {
      const text = `claim ${claim} cannot be read: ${error instanceof Error ? error.message : String(error)}`;
      next = { ...known, text, atMs: clock.nowMs(), isReading: false };
      if (!(error instanceof KubeError) && !this.#signal.aborted) next.text = `${text} (a defect of this controller)`;
    }
    this.#claims.set(key, next);
    const isNews = JSON.stringify([next.facts, next.text]) !== JSON.stringify([known.facts, known.text]);
    if (isNews && !this.#signal.aborted) this.changed(owner);
  }
}

function claimOrNone(url: string): string | undefined {
  try {
    return claimOf(url);
  } catch (error) {
    if (error instanceof FaultError) return undefined;
    throw error;
  }
}

const failed = (detail: string, againMs: number): NotYet => {
  return { kind: "not", answer: { kind: "failed", detail, againMs }, againMs };
};

const refused = (detail: string, againMs: number): NotYet => {
  const fault = invalid("spec.model.source", detail, "source_unusable");
  return { kind: "not", answer: { kind: "refused", fault }, againMs };
};

function nowhere(url: string, volume: readonly NodeTerm[], againMs: number): NotYet {
  const where = volume.length === 0 ? "" : ` with ${termsText(volume)}, where its volume can be mounted`;
  const text = `There are no nodes with GPUs of this wish${where}: none can look at ${url}.`;
  const reasons = [{ code: volume.length === 0 ? "no-nodes" : "volume-nodes", text }];
  return { kind: "not", answer: { kind: "infeasible", reasons, remedy: undefined }, againMs };
}

function atSource(fault: Fault, url: string): Fault {
  const detail = fault.field === "" ? fault.detail : `${fault.field}: ${fault.detail}`;
  const meaning = url.startsWith("file://") ? `; ${FILE_MEANS}` : "";
  return { ...fault, field: "spec.model.source", detail: `${detail}${meaning}` };
}
