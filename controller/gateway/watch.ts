// What the gateway knows of models, replicas and leaders: the last state that its feed told. Owns names (who is meant by one)
// and since when a model is down; decides nothing.
//   W1  A feed that has lost its source keeps the last state: the gateway outlives controller and API server.
//   W2  A model that is not serving has one `downSince`, whoever asks.
//   W3  Entries of one namespace and name are replicas of one model. A name of several namespaces means none of them: only
//       `namespace/name` does.
import type { ServedModel, WatchEvent } from "../../proto/gen/muster/v1/control.ts";
import { Phase } from "../../proto/gen/muster/v1/control.ts";
import type { Feed } from "./feed.ts";

/** A leader that can be asked now: equal keys are the same process. */
export type Leader = { key: string; address: string; incarnation: bigint };

export type ReplicaView = {
  /** Unique in its model; empty where there is one alone. */
  readonly name: string;
  readonly served: ServedModel;
  /** Nothing while it does not serve. */
  readonly leader: Leader | undefined;
};

export type ModelView = {
  /** Unique and stable: the name, with its namespace where there is one. */
  readonly key: string;
  /** By what clients ask for it: the name where it is of one model alone, else the key. */
  readonly title: string;
  /** The entry that speaks for the model: the first that takes requests, else the one that is nearest to it. */
  readonly served: ServedModel;
  readonly replicas: readonly ReplicaView[];
  /** Of the entry that was told first: entries come in the order of preference. */
  readonly revision: string;
  /** Whom to report demand for; empty: nobody. */
  readonly deployment: string;
  /** Since when no replica takes new requests, on the gateway's clock. */
  readonly downSince: number | undefined;
  /** It is down because it sleeps or has not served since it was woken or first seen, not because something died. */
  readonly wakes: boolean;
};

export type Found = { view: ModelView } | { among: readonly ModelView[] };

function leaderOf(served: ServedModel): Leader | undefined {
  const canServe = served.phase === Phase.SERVING || served.phase === Phase.DEGRADED;
  if (!canServe || served.leaderAddress === "") return undefined;
  const { leaderAddress: address, incarnation } = served;
  return { key: `${address}#${incarnation}`, address, incarnation };
}

/** Nothing will change by waiting; a sleeping deployment (Stopped, but demand for it is reported) is woken. */
export const isHopeless = ({ phase, deployment }: ServedModel): boolean =>
  phase === Phase.INFEASIBLE || (phase === Phase.STOPPED && deployment === "");

/** What a model waits for, for people: `Loading: 3 of 4 ranks`; empty where it does not wait or is not known. */
export function waitingText(view: ModelView | undefined): string {
  if (view === undefined || view.downSince === undefined) return "";
  const { phase, cause } = view.served;
  const [name = ""] = Object.entries(Phase).find(([, value]) => value === phase) ?? [];
  const words = name.toLowerCase().replaceAll("_", " ");
  return cause === "" ? words : `${words}: ${cause}`;
}

/** How near an entry without a leader is to serving. */
function nearness(served: ServedModel): number {
  if (isHopeless(served)) return 0;
  if (served.phase === Phase.DEGRADED || served.phase === Phase.STOPPED) return 1;
  return served.phase;
}

function rank({ served, leader }: ReplicaView): number {
  const base = leader === undefined ? nearness(served) : 100;
  return served.draining ? base - 1_000 : base;
}

function keyOf({ namespace, name }: ServedModel): string {
  return namespace === "" ? name : `${namespace}/${name}`;
}

function modelView(key: string, entries: readonly ServedModel[], was: ModelView | undefined, now: number): ModelView {
  const replicas = entries.map((served) => ({ name: served.replica, served, leader: leaderOf(served) }));
  const [speaker] = replicas.toSorted((one, other) => rank(other) - rank(one));
  if (speaker === undefined) throw new Error(`model ${key} has no entry`);
  const takes = replicas.some(({ leader, served }) => leader !== undefined && !served.draining);
  const deployment = entries.find((served) => served.deployment !== "")?.deployment ?? "";
  const hasStaying = entries.some(({ replica, draining }) => replica !== "" && !draining);
  return {
    key,
    title: speaker.served.name,
    served: speaker.served,
    replicas,
    revision: entries[0]?.revision ?? "",
    deployment,
    downSince: takes ? undefined : (was?.downSince ?? now),
    wakes: !takes && deployment !== "" && (!hasStaying || (was?.wakes ?? true)),
  };
}

/** The state after an event, by key; what was down before stays down since then. */
export function viewOf(event: WatchEvent, before: ReadonlyMap<string, ModelView>, now: number): Map<string, ModelView> {
  const entries = Map.groupBy(event.models, keyOf);
  const names = Map.groupBy(entries.keys(), (key) => entries.get(key)?.[0]?.name ?? key);
  const views = new Map<string, ModelView>();
  for (const [key, own] of entries) {
    const view = modelView(key, own, before.get(key), now);
    const isAlone = names.get(view.served.name)?.length === 1;
    views.set(key, isAlone ? view : { ...view, title: key });
  }
  return views;
}

export class ModelsView {
  readonly feed: Feed;
  #models = new Map<string, ModelView>();
  #byName = new Map<string, ModelView[]>();
  #listeners: (() => void)[] = [];
  /** Whether a state has ever been told. */
  told = false;

  constructor(feed: Feed) {
    this.feed = feed;
  }

  /** Takes what the feed tells until aborted. */
  run(signal: AbortSignal): Promise<void> {
    return this.feed.run((event) => this.#take(event), signal);
  }

  models(): ModelView[] {
    return [...this.#models.values()];
  }

  byKey(key: string): ModelView | undefined {
    return this.#models.get(key);
  }

  /** By name, alias or key; nothing where no model is called so, several where the name is of several (W3). */
  find(name: string): Found | undefined {
    const own = this.#models.get(name);
    if (own) return { view: own };
    const [first, ...others] = this.#byName.get(name) ?? [];
    if (first === undefined) return undefined;
    return others.length === 0 ? { view: first } : { among: [first, ...others] };
  }

  onChange(listener: () => void): void {
    this.#listeners.push(listener);
  }

  #take(event: WatchEvent): void {
    this.told = true;
    this.#models = viewOf(event, this.#models, performance.now());
    this.#byName = new Map();
    for (const view of this.#models.values()) {
      const names = new Set(view.replicas.flatMap(({ served }) => [served.name, ...served.aliases]));
      for (const name of names) this.#byName.set(name, [...(this.#byName.get(name) ?? []), view]);
    }
    for (const listener of this.#listeners) listener();
  }
}
