// Trust of a controller: opened before anything else of it starts, kept while it leads. Owns the order: the authority is stored,
// with the broker's part and the bundle, then this process has a certificate, then pods can get theirs.
//
//   O1  what `openTrust` answers can be used at once; nothing else of the controller runs before.
//   O2  a term begins by reading the authority anew, and looks again each KEEP_MS and at every change that concerns it.
//   O3  what fails is tried again and said; only a port that cannot be had, or a broken invariant, ends the term.
import { Server } from "@grpc/grpc-js";
import { FaultError, invalid } from "../../../proto/fault.ts";
import { CertificatesService } from "../../../proto/gen/muster/v1/trust.ts";
import { MutualTrust, renewalMs, type Trust } from "../../../proto/trust.ts";
import { type KubeApi, KubeError } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { backoffMs } from "../api/rate-limit.ts";
import { podCertificateRequests } from "../api/resources.ts";
import type { Term } from "../lease/lease.ts";
import type { Stores } from "../run-controller.ts";
import { type Authority, bundleOf, LEAF_MS, makeLeaf } from "./authority.ts";
import { keepBundle, keepBundles, namespacesOf } from "./bundles.ts";
import { claimantOf } from "./claimant.ts";
import { Issuing, type IssuingOptions, REQUEST_BYTES_MAX } from "./issue.ts";
import { signerOf, signPodCertificates } from "./pod-certificates.ts";
import { type Broker, keepAuthority, keepBroker } from "./secrets.ts";
import { type ReadDocument, Tokens } from "./tokens.ts";

export type TrustOptions = {
  api: KubeApi;
  readDocument: ReadDocument;
  clock: Clock;
  random: () => number;
  /** Of the release: Secrets, the leader's Service, gateways. */
  namespace: string;
  /** Of this process; empty where it is in none. */
  pod: { name: string; uid: string; ip: string };
  /** Names by which the leader is found. */
  dns: readonly string[];
  /** host:port where certificates are asked for; undefined: nowhere. */
  enrol?: string | undefined;
  gatewayAccount?: string;
  leafMs?: number;
  /** Kubelets may ask for their pods where the server has requests for that; undefined: only pods themselves. */
  podCertificates?: { watched: string | undefined } | undefined;
  onNews?: (detail: string) => void;
  onTrouble?: (detail: string) => void;
};

export type ControllerTrust = {
  trust: Trust;
  /** Password of the broker's clients. */
  natsToken: string;
  /** Whom kubelets ask for certificates of worker pods; undefined: they cannot. */
  signer: string | undefined;
  /** While this process leads: a Part of run-controller.ts. */
  part: (lead: Lead) => Promise<void>;
};

/** What it needs of a term. */
export type Lead = {
  api: KubeApi;
  stores: Pick<Stores, "pods" | "groups" | "deployments" | "pools">;
  term: Pick<Term, "signal">;
};

export const GATEWAY_ACCOUNT = "muster-gateway";
const NO_POD = "process";
const KEEP_MS = 60_000;
/** A pass looks at each namespace: of many it looks less often, 2 calls a second at most. */
const EACH_MS = 500;
const BACKOFF = { baseMs: 500, maxMs: 15_000 };
const TROUBLES_TOLD_MAX = 8;

/** Throws FaultError where what is stored cannot be used, KubeError where the server does not let us. */
export async function openTrust(options: TrustOptions, signal: AbortSignal): Promise<ControllerTrust> {
  const keeper = await Keeper.open(options, signal);
  const { trust, broker, signer } = keeper;
  return { trust, natsToken: broker.token, signer, part: (lead) => keeper.run(lead) };
}

type Made = { authority: Authority; broker: Broker; trust: MutualTrust; signer: string | undefined };

class Keeper {
  readonly trust: MutualTrust;
  broker: Broker;
  readonly signer: string | undefined;
  readonly #options: TrustOptions;
  readonly #tokens: Tokens;
  #authority: Authority;
  #renewMs: number;
  /** Namespaces of the last pass. */
  #given: ReadonlySet<string> = new Set();

  private constructor(options: TrustOptions, made: Made) {
    this.#options = options;
    this.signer = made.signer;
    this.#authority = made.authority;
    this.broker = made.broker;
    this.trust = made.trust;
    this.#renewMs = renewalMs(made.trust.nats().cert);
    this.#tokens = new Tokens(options.readDocument, options.clock);
  }

  static async open(options: TrustOptions, signal: AbortSignal): Promise<Keeper> {
    const { api, namespace, clock } = options;
    const at = { api, namespace, nowMs: () => clock.nowMs() };
    const authority = await keepAuthority(at, undefined, signal);
    const broker = await keepBroker(at, authority, undefined, signal);
    await keepBundle(api, bundleOf(authority), namespace, signal);
    const trust = new MutualTrust(await ownLeaf(options, authority));
    return new Keeper(options, { authority, broker, trust, signer: await signerFor(options, signal) });
  }

  async run(lead: Lead): Promise<void> {
    const { stores } = lead;
    const bell = new Bell();
    this.#given = new Set();
    // Of an owner only its namespace counts: its status changes all the time.
    const unsubscribe = [stores.deployments, stores.pools, stores.groups].map((store) =>
      store.subscribe(({ object }) => this.#given.has(object.metadata.namespace ?? "") || bell.ring()),
    );
    const server = await this.#serve(lead);
    try {
      await Promise.all([this.#keep(lead, bell), this.#sign(lead)]);
    } finally {
      for (const end of unsubscribe) end();
      await server?.end();
    }
  }

  async #keep({ api, stores, term: { signal } }: Lead, bell: Bell): Promise<void> {
    const { clock, random, namespace, onTrouble } = this.#options;
    await this.#secrets(api, signal); // first of all: what others do in this term needs a certificate of now
    try {
      await Promise.all([stores.deployments, stores.pools, stores.groups].map((store) => store.synced(signal)));
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }
    for (let failures = 0; !signal.aborted; ) {
      bell.still();
      const troubles = await this.#secrets(api, signal);
      const namespaces = namespacesOf(stores, namespace);
      this.#given = namespaces;
      const shortfalls = await keepBundles(api, bundleOf(this.#authority), namespaces, signal);
      if (signal.aborted) return;
      troubles.push(...shortfalls.map((each) => `the bundle cannot be kept in ${each.namespace}: ${each.detail}`));
      for (const trouble of troubles.slice(0, TROUBLES_TOLD_MAX)) onTrouble?.(trouble);
      failures = troubles.length === 0 ? 0 : failures + 1;
      const nowMs = clock.nowMs();
      const keepMs = Math.max(KEEP_MS, namespaces.size * EACH_MS);
      const againMs = nowMs + (failures === 0 ? keepMs : backoffMs(failures, BACKOFF, random));
      await bell.wait(clock, signal, Math.min(againMs, Math.max(this.#renewMs, nowMs + BACKOFF.baseMs)));
    }
  }

  /** Reads and renews what is stored, then what is ours. Answers what could not be done. */
  async #secrets(api: KubeApi, signal: AbortSignal): Promise<string[]> {
    const { namespace, clock } = this.#options;
    const at = { api, namespace, nowMs: () => clock.nowMs() };
    const troubles: string[] = [];
    const before = bundleOf(this.#authority);
    try {
      this.#authority = await keepAuthority(at, this.#authority, signal);
      this.broker = await keepBroker(at, this.#authority, this.broker, signal);
    } catch (error) {
      if (signal.aborted) return [];
      if (!(error instanceof KubeError || error instanceof FaultError)) throw error;
      troubles.push(error.message);
    }
    if (bundleOf(this.#authority) !== before || clock.nowMs() >= this.#renewMs) {
      const leaf = await ownLeaf(this.#options, this.#authority);
      this.trust.update(leaf);
      this.#renewMs = renewalMs(leaf.cert);
    }
    return troubles;
  }

  /** What all ways to a certificate have in common. */
  #common({ stores }: Lead): Pick<IssuingOptions, "claimantOf" | "authority" | "clock" | "leafMs" | "onAnswer"> {
    const { clock, namespace, gatewayAccount = GATEWAY_ACCOUNT, leafMs, onNews } = this.#options;
    const accounts = { namespace, gateway: gatewayAccount };
    return {
      claimantOf: (claims) => claimantOf(claims, stores, accounts),
      authority: () => this.#authority,
      clock,
      ...(leafMs === undefined ? {} : { leafMs }),
      onAnswer: ({ who, detail }) => onNews?.(`${who}: ${detail}`),
    };
  }

  async #sign(lead: Lead): Promise<void> {
    const { random, podCertificates } = this.#options;
    if (this.signer === undefined) return;
    const own = { api: lead.api, random, signer: this.signer, watched: podCertificates?.watched };
    await signPodCertificates({ ...this.#common(lead), ...own }, lead.term.signal);
  }

  async #serve(lead: Lead): Promise<{ end: () => Promise<void> } | undefined> {
    const { enrol } = this.#options;
    if (enrol === undefined || lead.term.signal.aborted) return undefined;
    const issuing = new Issuing({ ...this.#common(lead), tokens: this.#tokens });
    const server = new Server({ "grpc.max_receive_message_length": REQUEST_BYTES_MAX });
    server.addService(CertificatesService, issuing.service);
    await new Promise<void>((done, fail) =>
      server.bindAsync(enrol, this.trust.openServer(), (error) => {
        if (error === null) done();
        else fail(new FaultError(invalid("enrol", `cannot listen on ${enrol}: ${error.message}`), { cause: error }));
      }),
    );
    return {
      end: () =>
        new Promise((done) => {
          server.tryShutdown(() => done());
          server.forceShutdown();
        }),
    };
  }
}

/** A pod whose volume nobody answers for never starts: where we may not even look there is no signer, and workers enrol. */
async function signerFor(options: TrustOptions, signal: AbortSignal): Promise<string | undefined> {
  const { api, namespace, podCertificates, onTrouble } = options;
  if (podCertificates === undefined || !(await api.serves(podCertificateRequests, signal))) return undefined;
  const { watched } = podCertificates;
  const signer = signerOf(namespace);
  const selection = {
    fieldSelector: `spec.signerName=${signer}`,
    ...(watched === undefined ? {} : { namespace: watched }),
  };
  try {
    await api.list(podCertificateRequests, { ...selection, limit: 1 }, signal);
    return signer;
  } catch (error) {
    if (!(error instanceof KubeError) || error.code !== 403) throw error;
    onTrouble?.(`PodCertificateRequests cannot be listed, workers enrol by their tokens: ${error.message}`);
    return undefined;
  }
}

function ownLeaf({ pod, namespace, dns, clock, leafMs = LEAF_MS }: TrustOptions, authority: Authority) {
  const nowMs = clock.nowMs();
  const identity = { role: "controller", namespace, name: pod.name || NO_POD, podUid: pod.uid || NO_POD } as const;
  const wanted = { identity, dns, ips: pod.ip === "" ? [] : [pod.ip], notAfterMs: nowMs + leafMs };
  return makeLeaf(authority, wanted, nowMs);
}

/** Wakes whoever waits, or keeps the next from waiting. */
class Bell {
  #hasRung = new AbortController();

  ring(): void {
    this.#hasRung.abort();
  }

  still(): void {
    this.#hasRung = new AbortController();
  }

  async wait(clock: Clock, signal: AbortSignal, untilMs: number): Promise<void> {
    await clock.sleep(AbortSignal.any([signal, this.#hasRung.signal]), untilMs);
  }
}
