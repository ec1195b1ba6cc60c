// Where the choices of one model run: on one of its replicas, or held while none can take them. Owns the replicas' coming and
// going and absorbs what steps bring into the logs. Knows nothing of clients.
//
//   S3  A choice is in exactly one place: on one replica under its id, or held, or not in the lane any more.
//   S4  What a replica loses or refuses goes to another one at once; where there is none it is held until one is there.
import type { Chunk, Fault } from "../../proto/gen/muster/v1/worker.ts";
import type { Trust } from "../../proto/trust.ts";
import { Replica, type Running } from "./replica.ts";
import type { Verdict } from "./requests.ts";
import { absorb, holdChoice, revisionChanged } from "./requests.ts";
import { type Need, replacedBy, route } from "./route.ts";
import type { ModelsView, ReplicaView } from "./watch.ts";

export type { Running } from "./replica.ts";
export type Step<Owner> = { running: Running<Owner>; chunk: Chunk; verdict: Verdict };

export type LaneEvents<Owner> = {
  /** All that one step brought, absorbed already. */
  step(steps: Step<Owner>[], now: number): void;
  /** The choice cannot go on; it has left the lane. */
  stranded(running: Running<Owner>, fault: Fault): void;
  /** The choice has been given to this replica. */
  placed(replica: string): void;
};

export type LaneOptions<Owner> = { model: string; view: ModelsView; trust: Trust; events: LaneEvents<Owner> };

export class Lane<Owner> {
  /** Key of the model. */
  readonly model: string;
  readonly held = new Set<Running<Owner>>();
  readonly #options: LaneOptions<Owner>;
  readonly #replicas = new Map<string, Replica<Owner>>();
  #wanted = "";
  /** A new state is being taken in: nothing is placed by half of it. */
  #isSeeing = false;

  constructor(options: LaneOptions<Owner>) {
    this.#options = options;
    this.model = options.model;
    this.viewChanged();
  }

  get replicas(): Iterable<Replica<Owner>> {
    return this.#replicas.values();
  }

  get running(): number {
    let sum = 0;
    for (const { running } of this.#replicas.values()) sum += running;
    return sum;
  }

  /** Opens the choice now where a replica can take it, else holds it. */
  add(running: Running<Owner>): void {
    this.#place(running, true);
  }

  /** Takes the choice off its leader at once. */
  remove(running: Running<Owner>): void {
    this.held.delete(running);
    for (const replica of this.#replicas.values()) replica.cancel(running);
  }

  viewChanged(): void {
    const view = this.#options.view.byKey(this.model);
    const told = view?.replicas ?? [];
    this.#wanted = view?.revision ?? "";
    const names = new Set(told.map(({ name }) => name));
    this.#isSeeing = true;
    for (const [name, replica] of this.#replicas) {
      if (names.has(name)) continue;
      this.#replicas.delete(name);
      replica.close();
    }
    for (const one of told) {
      const known = this.#replicas.get(one.name);
      if (known) known.see(one);
      else this.#replicas.set(one.name, this.#make(one));
    }
    this.#isSeeing = false;
    this.#pump();
  }

  /** Ids of a text or of messages; nothing while no replica is linked. */
  tokenize(input: Parameters<Replica<Owner>["tokenize"]>[0]): Promise<number[]> | undefined {
    const need: Need = { origin: undefined, sticky: "", isNew: true, revision: this.#wanted, bound: undefined };
    return route(this.#linked(), need)?.tokenize(input);
  }

  close(): void {
    for (const replica of this.#replicas.values()) replica.close();
    this.#replicas.clear();
  }

  #make(view: ReplicaView): Replica<Owner> {
    const { trust } = this.#options;
    return new Replica<Owner>({
      view,
      credentials: ({ served: { namespace, replica } }) =>
        trust.channel({ role: "worker", ...(namespace === "" ? {} : { namespace, group: replica }) }),
      events: {
        chunks: (replica, chunks) => this.#take(replica, chunks),
        left: (left) => {
          for (const running of left) this.held.add(running);
          this.#pump();
        },
        rested: () => this.#pump(),
      },
    });
  }

  #linked(): Replica<Owner>[] {
    return [...this.#replicas.values()].filter((replica) => replica.isLinked);
  }

  #pump(): void {
    if (this.#isSeeing) return;
    for (const running of [...this.held]) if (this.held.delete(running)) this.#place(running, false);
  }

  #place(running: Running<Owner>, isNew: boolean): void {
    const { origin, sticky, kin } = running.choice;
    const wanted = this.#wanted;
    const need = { origin, sticky, isNew, revision: wanted, bound: kin.revision };
    const replica = route(this.#linked(), need);
    if (replica) {
      replica.open(running);
      this.#options.events.placed(replica.name);
      return;
    }
    const { revision } = kin;
    if (revision !== undefined) {
      const other = replacedBy({ revision, wanted, hasBegun: origin !== undefined }, this.#standings());
      if (other !== undefined) {
        this.#options.events.stranded(running, revisionChanged(revision, other));
        return;
      }
    }
    this.held.add(running);
  }

  #standings() {
    return [...this.#replicas.values()].map(({ revision, isDraining: draining, isServing }) => ({
      revision,
      draining,
      isServing,
    }));
  }

  #take(replica: Replica<Owner>, chunks: Chunk[]): void {
    const now = performance.now();
    const steps: Step<Owner>[] = [];
    let refused = false;
    for (const chunk of chunks) {
      const running = replica.at(chunk.id);
      if (!running) continue;
      const verdict = this.#absorb(replica, running, chunk, now);
      if (chunk.tokens.length > 0) replica.isWell();
      // Opened on another revision than its request's: what came with it is nobody's.
      const isElsewhere = verdict === "hold" && !chunk.finish;
      if (isElsewhere) replica.cancelId(chunk.id);
      else steps.push({ running, chunk, verdict });
      if (verdict === "going") continue;
      replica.forget(chunk.id);
      // Before the step is told: whoever is told may take the choice off the lane again.
      if (verdict === "hold") this.held.add(running);
      refused ||= verdict === "hold";
      // Refused at Opened: the leader still runs it.
      if (running.choice.state.kind === "failed" && !chunk.finish) replica.cancelId(chunk.id);
    }
    if (refused) replica.rest();
    this.#options.events.step(steps, now);
    if (refused) this.#pump();
  }

  #absorb(replica: Replica<Owner>, { choice }: Running<Owner>, chunk: Chunk, now: number): Verdict {
    const verdict = absorb(choice, chunk, now);
    const isFull = choice.state.kind === "failed" && choice.state.fault.code === "queue_full";
    if (!isFull) return verdict;
    // Another replica may have a place for who is new; where all others rest too the refusal stands.
    const others = this.#linked().filter((other) => other !== replica && !other.isResting && !other.isDraining);
    if (others.length === 0) return verdict;
    holdChoice(choice, now);
    return "hold";
  }
}
