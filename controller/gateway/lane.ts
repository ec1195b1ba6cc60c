// Where the choices of one model run: on the link to its leader, or held while there is none. Owns the link, the ids on
// it and the back-off; absorbs what steps bring into the logs. Knows nothing of clients.
//
//   S3  A choice is in exactly one place: on the link under its id, or held, or not in the lane any more.
//   S4  Another leader is tried at once; the same one only after a back-off that grows until a token comes.
import type { Chunk, Fault } from "../../proto/gen/muster/v1/worker.ts";
import { LeaderLink } from "./leader.ts";
import type { Choice, Verdict } from "./requests.ts";
import { absorb, holdChoice, openChoice, revisionChanged } from "./requests.ts";
import type { ControlView } from "./watch.ts";

const RETRY_MIN_MS = 50;
const RETRY_MAX_MS = 2_000;

export type Step<Owner> = { running: Running<Owner>; chunk: Chunk; verdict: Verdict };
export type Running<Owner> = { readonly owner: Owner; readonly choice: Choice };

export type LaneEvents<Owner> = {
  /** All that one step brought, absorbed already. */
  step(steps: Step<Owner>[], now: number): void;
  /** The choice cannot go on; it has left the lane. */
  stranded(running: Running<Owner>, fault: Fault): void;
};

export class Lane<Owner> {
  readonly model: string;
  readonly held = new Set<Running<Owner>>();
  link: LeaderLink | undefined;
  readonly #byId = new Map<number, Running<Owner>>();
  readonly #view: ControlView;
  readonly #events: LaneEvents<Owner>;
  #lastId = 0;
  #retryMs = RETRY_MIN_MS;
  #retry: NodeJS.Timeout | undefined;

  constructor(model: string, view: ControlView, events: LaneEvents<Owner>) {
    this.model = model;
    this.#view = view;
    this.#events = events;
  }

  /** Opens the choice now where there is a leader, else holds it. */
  add(running: Running<Owner>): void {
    this.#connect();
    if (this.link) this.#open(running);
    else this.held.add(running);
  }

  /** Takes the choice off the leader at once. */
  remove(running: Running<Owner>): void {
    this.held.delete(running);
    const { state } = running.choice;
    if (state.kind === "open" && this.#byId.delete(state.id)) this.link?.cancel(state.id);
  }

  viewChanged(): void {
    if (!this.link && this.#view.find(this.model)?.leader) this.#clearRetry();
    this.#connect();
    this.#pump();
  }

  /** The link to the model's leader, made if need be; nothing while there is no leader. */
  connected(): LeaderLink | undefined {
    this.#connect();
    return this.link;
  }

  close(): void {
    clearTimeout(this.#retry);
    this.link?.close();
    this.link = undefined;
  }

  #connect(): void {
    const leader = this.#view.find(this.model)?.leader;
    if (this.link && this.link.leader.key !== leader?.key) {
      this.link.close();
      this.#leave();
    }
    if (this.link || !leader || this.#retry) return;
    this.link = new LeaderLink(leader, {
      chunks: (chunks) => this.#take(chunks),
      down: () => {
        this.#leave();
        this.#retryLater();
      },
    });
  }

  #leave(): void {
    const now = performance.now();
    this.link = undefined;
    const left = [...this.#byId.values()];
    this.#byId.clear();
    for (const running of left) {
      holdChoice(running.choice, now);
      this.held.add(running);
    }
  }

  #pump(): void {
    if (this.held.size === 0) return;
    this.#connect();
    if (!this.link) return;
    for (const running of [...this.held]) if (this.held.delete(running)) this.#open(running);
  }

  #open(running: Running<Owner>): void {
    const { choice } = running;
    const revision = this.#view.find(this.model)?.served.revision ?? "";
    if (choice.origin && choice.origin.revision !== revision) {
      this.#events.stranded(running, revisionChanged(choice.origin.revision, revision));
      return;
    }
    do this.#lastId = this.#lastId === 0xffffffff ? 1 : this.#lastId + 1;
    while (this.#byId.has(this.#lastId));
    this.#byId.set(this.#lastId, running);
    this.link?.open(openChoice(choice, this.#lastId));
  }

  #take(chunks: Chunk[]): void {
    const now = performance.now();
    const steps: Step<Owner>[] = [];
    for (const chunk of chunks) {
      const running = this.#byId.get(chunk.id);
      if (!running) continue;
      const verdict = absorb(running.choice, chunk, now);
      if (chunk.tokens.length > 0) this.#retryMs = RETRY_MIN_MS;
      steps.push({ running, chunk, verdict });
      if (verdict === "going") continue;
      this.#byId.delete(chunk.id);
      // Before the step is told: whoever is told may take the choice off the lane again.
      if (verdict === "hold") this.held.add(running);
      // Refused at Opened: the leader still runs it.
      if (running.choice.state.kind === "failed" && !chunk.finish) this.link?.cancel(chunk.id);
    }
    this.#events.step(steps, now);
    if (this.held.size > 0) this.#retryLater();
  }

  #retryLater(): void {
    if (this.#retry) return;
    const wait = this.#retryMs * (0.5 + Math.random() / 2);
    this.#retryMs = Math.min(this.#retryMs * 2, RETRY_MAX_MS);
    this.#retry = setTimeout(() => {
      this.#retry = undefined;
      this.#pump();
    }, wait);
  }

  #clearRetry(): void {
    clearTimeout(this.#retry);
    this.#retry = undefined;
    this.#retryMs = RETRY_MIN_MS;
  }
}
