// Certificates by PodCertificateRequest: kubelets ask for them in the name of a pod, before its containers start, and the API
// server has checked that the node is the pod's. Owns the answers to the requests of one signer.
//
//   R1  who a pod is, is said by our own stores (claimant.ts), as for pods that come with a token; of the request only its key is
//       taken.
//   R2  a request is answered once. One of which nobody knows yet whose it is waits, until its kubelet gives it up.
//   R3  an answer is written over the version that was looked at: two controllers never both answer.
import { type KubeApi, KubeError, type KubeObject, keyOf } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { fieldsOf, listOf, millisOf, textOf } from "../api/fields.ts";
import { podCertificateRequests } from "../api/resources.ts";
import { KEY_TYPE } from "../groups/pods.ts";
import { Reflector } from "../watch/reflector.ts";
import { Store } from "../watch/store.ts";
import { WorkQueue } from "../watch/work-queue.ts";
import { type Authority, LEAF_MS, pemOf, sign } from "./authority.ts";
import type { Claimant } from "./claimant.ts";
import { keyOfRequest } from "./issue.ts";
import type { Claims } from "./tokens.ts";

/** Of the release: two installations on one cluster do not answer each other's pods. */
export const signerOf = (namespace: string): string => `muster.dev/${namespace}`;

/** Within the 5 minutes that the API server allows, and more than two clocks are apart. */
const SKEW_MS = 60_000;
/** The API server takes no shorter life. */
const LIFE_MS_MIN = 3_600_000;
/** The kubelet asks anew at half of the life: at two thirds a worker goes for one itself. */
const REFRESH_PART = 1 / 2;
/** A kubelet forgets its request after about as long; nobody reads the answer then. */
const GIVEN_UP_MS = 900_000;
const EARLY_MS = 500;
const CONCURRENCY = 4;
const BACKOFF = { baseMs: 200, maxMs: 10_000 };
/** Of a condition. */
const MESSAGE_MAX = 1_024;

export type PodCertificatesOptions = {
  api: KubeApi;
  clock: Clock;
  random: () => number;
  signer: string;
  /** Of this namespace alone; undefined: of all. */
  watched?: string | undefined;
  claimantOf: (claims: Claims) => Claimant;
  authority: () => Authority;
  leafMs?: number;
  /** Each answer, and each request that waits. */
  onAnswer?: (answer: { who: string; detail: string }) => void;
};

/** Answers until aborted. */
export async function signPodCertificates(options: PodCertificatesOptions, signal: AbortSignal): Promise<void> {
  const { api, clock, random, signer, watched, onAnswer } = options;
  const store = new Store();
  const onRelief = () => {
    for (const object of store.all()) queue.add(keyOf(object));
  };
  const queue = new WorkQueue({ name: "certificates", clock, random, limits: { backoff: BACKOFF }, onRelief });
  store.subscribe(({ kind, object }) => {
    if (kind !== "deleted" && !isAnswered(object)) queue.add(keyOf(object));
  });
  const fieldSelector = `spec.signerName=${signer}`;
  const selection = { fieldSelector, ...(watched === undefined ? {} : { namespace: watched }) };
  const reflector = new Reflector({ api, resource: podCertificateRequests, store, clock, random, ...selection });
  const said = new Map<string, string>();
  const handle = async (key: string): Promise<{ againMs?: number } | undefined> => {
    const request = store.get(key);
    if (request === undefined || isAnswered(request) || isGivenUp(request, clock.nowMs())) {
      said.delete(key);
      return undefined;
    }
    const answer = await answerTo(request, options);
    if (said.get(key) !== answer.detail) onAnswer?.(answer);
    if (answer.status === undefined) {
      said.set(key, answer.detail);
      return { againMs: clock.nowMs() + EARLY_MS };
    }
    said.delete(key);
    store.put(await api.replaceStatus(podCertificateRequests, { ...request, status: answer.status }, signal));
    return undefined;
  };
  const onFailure = (key: string, error: unknown) => {
    const isOvertaken = error instanceof KubeError && (error.code === 409 || error.code === 404);
    if (!isOvertaken) onAnswer?.({ who: key, detail: error instanceof Error ? error.message : String(error) });
  };
  await Promise.all([reflector.run(signal), queue.work(handle, { concurrency: CONCURRENCY, onFailure }, signal)]);
}

type Answer = { who: string; detail: string; status: object | undefined };

/** `status` undefined: not yet. */
async function answerTo(request: KubeObject, options: PodCertificatesOptions): Promise<Answer> {
  const { claimantOf, clock, authority, leafMs = LEAF_MS } = options;
  const spec = fieldsOf(request.spec);
  const namespace = request.metadata.namespace ?? "";
  const name = textOf(spec.podName) ?? "";
  const who = `${namespace}/${name}`;
  const nowMs = clock.nowMs();
  const deny = (reason: string, detail: string): Answer => {
    return { who, detail, status: { conditions: [conditionOf("Denied", { reason, detail, nowMs })] } };
  };
  if (Object.keys(fieldsOf(spec.unverifiedUserAnnotations)).length > 0)
    return deny("InvalidUnverifiedUserAnnotations", "spec.unverifiedUserAnnotations: this signer knows none");
  const key = await keyOfRequest(Buffer.from(textOf(spec.stubPKCS10Request) ?? "", "base64"));
  if (typeof key === "string") return deny("UnsupportedKeyType", `${KEY_TYPE}: ${key}`);
  const pod = { name, uid: textOf(spec.podUID) ?? "" };
  const claimant = claimantOf({ namespace, pod, account: textOf(spec.serviceAccountName) ?? "" });
  if (claimant.kind === "early") return { who, detail: claimant.detail, status: undefined };
  if (claimant.kind === "refused") return deny("Refused", claimant.detail);
  const notBeforeMs = secondOf(nowMs - SKEW_MS);
  const wishedMs = Number(spec.maxExpirationSeconds ?? LEAF_MS / 1000) * 1000;
  const notAfterMs = secondOf(notBeforeMs + Math.max(LIFE_MS_MIN, Math.min(leafMs, wishedMs)));
  const { identity, dns } = claimant;
  const leaf = await sign(authority(), key, { identity, dns, ips: [], notBeforeMs, notAfterMs }, nowMs);
  const detail = `has a certificate as ${identity.role}`;
  return {
    who,
    detail,
    status: {
      conditions: [conditionOf("Issued", { reason: "Issued", detail, nowMs })],
      certificateChain: pemOf(leaf.der),
      notBefore: timeOf(notBeforeMs),
      beginRefreshAt: timeOf(notBeforeMs + (leaf.notAfterMs - notBeforeMs) * REFRESH_PART),
      notAfter: timeOf(leaf.notAfterMs),
    },
  };
}

function conditionOf(
  type: "Issued" | "Denied",
  { reason, detail, nowMs }: { reason: string; detail: string; nowMs: number },
): object {
  const message = detail.slice(0, MESSAGE_MAX);
  return { type, status: "True", reason, message, lastTransitionTime: timeOf(nowMs) };
}

const isAnswered = ({ status }: KubeObject): boolean => listOf(fieldsOf(status).conditions).length > 0;

const isGivenUp = ({ metadata }: KubeObject, nowMs: number): boolean =>
  nowMs - (millisOf(metadata.creationTimestamp) ?? nowMs) > GIVEN_UP_MS;

/** Certificates know no smaller time. */
const secondOf = (ms: number): number => Math.floor(ms / 1000) * 1000;

const timeOf = (ms: number): string => new Date(secondOf(ms)).toISOString().replace(".000Z", "Z");
