// Which replica a choice goes to: filter, score, pick. Pure; owns the rules, not the figures they are applied to.
//   R1  A choice that has begun goes on only on its revision; of those that serve it, one of its own numerics id first.
//   R2  What drains takes nothing new; it takes over what has begun on its revision only where no other does.
//   R3  What was lost or refused lately rests: it gets nothing but a new choice that no other replica can take.
//   R4  A new choice goes to the revision that is wanted as long as a replica of it takes it up at once: others are being
//       replaced. Where all of those have queues every revision counts: the first new replica cannot do the work of all old ones.
//   R5  One conversation keeps its replica (where its prefix may still be cached) until that is clearly busier than another.
//   R6  A request has one revision: what one of its choices has begun on binds the others.

export type Load = {
  /** Sequences on the leader, by its last figures. */
  running: number;
  waiting: number;
  /** Bound of its queue; 0: not known. */
  queueMax: number;
  /** Given to it by this gateway since those figures. */
  unseen: number;
  /** Free share of its KV blocks; 1 where it is not known. */
  kvFree: number;
};

/** A replica that serves now. */
export type Candidate = {
  readonly name: string;
  readonly revision: string;
  readonly numericsId: string;
  readonly isDraining: boolean;
  readonly isResting: boolean;
  readonly load: Load;
};

export type Need = {
  /** Who answered `Opened` first; undefined: it has not begun. */
  origin: { revision: string; numericsId: string } | undefined;
  /** Equal for requests of one conversation. */
  sticky: string;
  /** Its first try: nobody has lost or refused it. */
  isNew: boolean;
  /** The revision that is wanted. */
  revision: string;
  /** The one that its request has begun on by another choice; undefined: none has begun. */
  bound: string | undefined;
};

/** Of two that wait at a leader each costs a step and a place: counted twice, so that queues even out before batches do. */
const WAITING_COST = 2;
/** Below this share of free KV blocks running sequences begin to push each other out, at up to so many sequences' cost. */
const KV_TIGHT = 0.1;
const KV_TIGHT_COST = 16;
/** What a warm prefix is worth: a few sequences more, or a quarter more where there are many. */
const STICKY_SLACK = 4;
const STICKY_SHARE = 0.25;

/** In sequences: what a new one would have beside and before it. */
export function costOf({ running, waiting, unseen, kvFree }: Load): number {
  const tightness = Math.max(0, 1 - kvFree / KV_TIGHT);
  return running + WAITING_COST * waiting + unseen + KV_TIGHT_COST * tightness;
}

const isFull = ({ load }: Candidate): boolean => load.queueMax > 0 && load.waiting >= load.queueMax;

/** Those for which it is true, or all where there are none. */
function preferring<T>(all: readonly T[], isBetter: (one: T) => boolean): readonly T[] {
  const better = all.filter(isBetter);
  return better.length > 0 ? better : all;
}

function eligible<C extends Candidate>(all: readonly C[], need: Need): readonly C[] {
  const { origin, isNew, bound, revision: wanted } = need;
  const fresh = all.filter((one) => !one.isResting);
  const awake = fresh.length === 0 && isNew ? all : fresh;
  if (origin === undefined) {
    const taking = awake.filter((one) => !one.isDraining && (bound === undefined || one.revision === bound));
    const roomy = preferring(taking, (one) => !isFull(one));
    return preferring(roomy, ({ revision, load }) => revision === wanted && load.waiting === 0);
  }
  const same = awake.filter(({ revision }) => revision === origin.revision);
  const staying = preferring(same, (one) => !one.isDraining);
  const exact = preferring(staying, ({ numericsId }) => numericsId === origin.numericsId);
  return preferring(exact, (one) => !isFull(one));
}

/** The replica to go to; nothing where the choice must be held. */
export function route<C extends Candidate>(all: readonly C[], need: Need): C | undefined {
  const ranked = eligible(all, need).map((one) => ({
    one,
    cost: costOf(one.load),
    affinity: affinity(need.sticky, one.name),
  }));
  const [sticky] = ranked.toSorted((a, b) => b.affinity - a.affinity);
  const [least] = ranked.toSorted((a, b) => a.cost - b.cost || b.affinity - a.affinity);
  if (sticky === undefined || least === undefined) return undefined;
  const slack = Math.max(STICKY_SLACK, STICKY_SHARE * least.cost);
  return sticky.cost <= least.cost + slack ? sticky.one : least.one;
}

/**
 * Rendezvous hashing: each conversation has its own order of replicas, and one that comes or goes moves only the conversations
 * that it is first for. FNV-1a with a finishing mix, 32 bits.
 */
export function affinity(sticky: string, replica: string): number {
  let hash = 0x811c9dc5;
  for (const text of [sticky, "\0", replica]) {
    for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  }
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

type Standing = { revision: string; draining: boolean; isServing: boolean };

type Stuck = {
  revision: string;
  /** The revision that is wanted; empty: not known. */
  wanted: string;
  /** What drains may still go on with what has begun. */
  hasBegun: boolean;
};

/** The revision that has replaced this one: no replica of it can take the choice or ever will. Nothing while one may. */
export function replacedBy({ revision, wanted, hasBegun }: Stuck, replicas: readonly Standing[]): string | undefined {
  const mayTake = ({ draining, isServing }: Standing) => !draining || (hasBegun && isServing);
  if (replicas.some((one) => one.revision === revision && mayTake(one))) return undefined;
  if (wanted !== "" && wanted !== revision) return wanted;
  return replicas.find((one) => one.isServing && one.revision !== revision)?.revision;
}
