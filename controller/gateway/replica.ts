// One replica as the lane of its model sees it: the link to its leader, the choices on it, its back-off and its load. Owns the
// ids on the link; which choice comes here is route.ts's.
//   P1  A choice that is here is open under an id of the present link; when the link goes, all of them are handed back at once.
//   P2  Another leader is tried at once; the same one only after a back-off that grows until a token comes.
//   P3  A replica that drains keeps its link as long as that lives, whatever its status says: what it has begun it may end.
import type { ChannelCredentials } from "@grpc/grpc-js";
import type { Chunk, TokenizeIdsRequest, WorkerStats } from "../../proto/gen/muster/v1/worker.ts";
import { LeaderLink } from "./leader.ts";
import type { Choice } from "./requests.ts";
import { holdChoice, openChoice } from "./requests.ts";
import type { Candidate, Load } from "./route.ts";
import type { ReplicaView } from "./watch.ts";

const RETRY_MIN_MS = 50;
const RETRY_MAX_MS = 2_000;

export type Running<Owner> = { readonly owner: Owner; readonly choice: Choice };

export type ReplicaEvents<Owner> = {
  chunks(replica: Replica<Owner>, chunks: Chunk[]): void;
  /** The link is gone; these were on it and are held now. */
  left(running: Running<Owner>[]): void;
  /** It may be tried again. */
  rested(): void;
};

export type ReplicaOptions<Owner> = {
  view: ReplicaView;
  credentials: (view: ReplicaView) => ChannelCredentials;
  events: ReplicaEvents<Owner>;
};

export class Replica<Owner> implements Candidate {
  readonly name: string;
  /** The leader's last figures; nothing before the first. */
  stats: WorkerStats | undefined;
  #view: ReplicaView;
  #link: LeaderLink | undefined;
  readonly #options: ReplicaOptions<Owner>;
  readonly #byId = new Map<number, Running<Owner>>();
  #lastId = 0;
  #unseen = 0;
  #retryMs = RETRY_MIN_MS;
  #retry: NodeJS.Timeout | undefined;

  constructor(options: ReplicaOptions<Owner>) {
    this.#options = options;
    this.#view = options.view;
    this.name = options.view.name;
    this.#connect();
  }

  get revision(): string {
    return this.#view.served.revision;
  }

  get numericsId(): string {
    return this.#view.served.numericsId;
  }

  get isDraining(): boolean {
    return this.#view.served.draining;
  }

  get isResting(): boolean {
    return this.#retry !== undefined;
  }

  /** Whether it can be given a choice at all. */
  get isLinked(): boolean {
    return this.#link !== undefined;
  }

  /** Whether it serves as far as is known, linked or not. */
  get isServing(): boolean {
    return this.isLinked || this.#view.leader !== undefined;
  }

  get running(): number {
    return this.#byId.size;
  }

  get load(): Load {
    const { stats } = this;
    if (stats === undefined) return { running: 0, waiting: 0, queueMax: 0, unseen: this.running, kvFree: 1 };
    const { running, waiting, queueMax, kvBlocksFree, kvBlocksTotal } = stats;
    const kvFree = kvBlocksTotal > 0 ? kvBlocksFree / kvBlocksTotal : 1;
    return { running, waiting, queueMax, unseen: this.#unseen, kvFree };
  }

  /** What is told of it now. */
  see(view: ReplicaView): void {
    const { leader, served } = view;
    const before = this.#view.leader;
    this.#view = view;
    const other = leader !== undefined && this.#link !== undefined && leader.key !== this.#link.leader.key;
    const gone = leader === undefined && !served.draining;
    if (this.#link !== undefined && (other || gone)) {
      this.#link.close();
      this.#leave();
    }
    if (leader !== undefined && leader.key !== before?.key) this.#clearRest();
    this.#connect();
  }

  /** Opens the choice here, or goes on with it. */
  open(running: Running<Owner>): void {
    do this.#lastId = this.#lastId === 0xffffffff ? 1 : this.#lastId + 1;
    while (this.#byId.has(this.#lastId));
    this.#byId.set(this.#lastId, running);
    this.#unseen += 1;
    this.#link?.open(openChoice(running.choice, this.#lastId));
  }

  /** The choice that is open under this id. */
  at(id: number): Running<Owner> | undefined {
    return this.#byId.get(id);
  }

  /** The leader has ended it. */
  forget(id: number): void {
    if (this.#byId.delete(id)) this.#unseen = Math.max(0, this.#unseen - 1);
  }

  /** Takes the choice off the leader, where it is here. */
  cancel(running: Running<Owner>): void {
    const { state } = running.choice;
    if (state.kind !== "open" || this.#byId.get(state.id) !== running) return;
    this.forget(state.id);
    this.#link?.cancel(state.id);
  }

  /** The leader still runs what is not wanted any more. */
  cancelId(id: number): void {
    this.#link?.cancel(id);
  }

  tokenize(input: NonNullable<TokenizeIdsRequest["input"]>): Promise<number[]> | undefined {
    return this.#link?.tokenize(input);
  }

  /** A token came: the next failure is the first one. */
  isWell(): void {
    this.#retryMs = RETRY_MIN_MS;
  }

  /** It has refused or lost something: not again before a while. */
  rest(): void {
    if (this.#retry) return;
    const wait = this.#retryMs * (0.5 + Math.random() / 2);
    this.#retryMs = Math.min(this.#retryMs * 2, RETRY_MAX_MS);
    this.#retry = setTimeout(() => {
      this.#retry = undefined;
      this.#connect();
      this.#options.events.rested();
    }, wait);
  }

  /** Hands back what is open. */
  close(): void {
    this.#clearRest();
    this.#link?.close();
    this.#leave();
  }

  #connect(): void {
    const { leader } = this.#view;
    if (this.#link || leader === undefined || this.#retry) return;
    const link = new LeaderLink(leader, this.#options.credentials(this.#view), {
      chunks: (chunks) => this.#options.events.chunks(this, chunks),
      stats: (stats) => {
        if (this.#link !== link) return;
        this.stats = stats;
        this.#unseen = 0;
      },
      down: () => {
        this.rest();
        this.#leave();
      },
    });
    this.#link = link;
  }

  #leave(): void {
    const now = performance.now();
    this.#link = undefined;
    this.stats = undefined;
    this.#unseen = 0;
    const left = [...this.#byId.values()];
    this.#byId.clear();
    for (const { choice } of left) holdChoice(choice, now);
    this.#options.events.left(left);
  }

  #clearRest(): void {
    clearTimeout(this.#retry);
    this.#retry = undefined;
    this.#retryMs = RETRY_MIN_MS;
  }
}
