// Certificates of pods, asked for as kubelets do: a key of the node's own making, a PodCertificateRequest in the pod's name, the
// signer's answer beside the key. A kubelet waits up to five minutes more before it renews; this one renews when it is told.
import "reflect-metadata";
import { createPrivateKey, webcrypto } from "node:crypto";
import * as x509 from "@peculiar/x509";
import { z } from "zod";
import type { RawApi } from "../controlplane/raw-api.ts";
import { NotThere, type Place } from "./environment.ts";
import type { Pod } from "./pod.ts";

const ALGORITHM = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
const AGAIN_MS = 500;

const Named = z.looseObject({ metadata: z.looseObject({ name: z.string(), uid: z.string() }) });
const Request = z.looseObject({
  status: z
    .looseObject({
      conditions: z.array(z.looseObject({ type: z.string(), message: z.string().default("") })).default([]),
      certificateChain: z.string().default(""),
      beginRefreshAt: z.string().default(""),
    })
    .prefault({}),
});

export type Wanted = { signerName: string; keyType: string; credentialBundlePath: string };
type Held = { bundle: Buffer; refreshAtMs: number };
type State = { held?: Held; asked?: { key: string; path: string } | undefined };
type Site = { api: RawApi; pod: Pod; place: Place };

/** By the place of a pod: they end with it. */
const states = new WeakMap<Place, Map<string, State>>();

/** Key and chain in PEM. Throws NotThere while nobody has answered, and for good where the signer refuses. */
export async function certificateOf(site: Site, wanted: Wanted): Promise<Held> {
  const own = states.get(site.place) ?? new Map<string, State>();
  states.set(site.place, own);
  const state = own.get(wanted.signerName) ?? {};
  own.set(wanted.signerName, state);
  if (state.held !== undefined && Date.now() < state.held.refreshAtMs) return state.held;
  try {
    state.held = await renewed(site, wanted, state);
  } catch (error) {
    if (state.held === undefined) throw error;
    return { ...state.held, refreshAtMs: Date.now() + AGAIN_MS };
  }
  return state.held;
}

async function renewed({ api, pod, place }: Site, wanted: Wanted, state: State): Promise<Held> {
  state.asked ??= await ask({ api, pod, place }, wanted);
  const { key, path } = state.asked;
  const found = await api.find(path);
  if (found === undefined) {
    state.asked = undefined;
    throw new NotThere(`${path} is gone`);
  }
  const { conditions, certificateChain, beginRefreshAt } = Request.parse(found).status;
  const [answer] = conditions;
  if (answer === undefined) throw new NotThere(`signer ${wanted.signerName} has not answered yet`);
  if (answer.type !== "Issued") throw new NotThere(`signer ${wanted.signerName}: ${answer.type}: ${answer.message}`);
  state.asked = undefined;
  return { bundle: Buffer.from(`${key}${certificateChain}`), refreshAtMs: Date.parse(beginRefreshAt) };
}

async function ask({ api, pod }: Site, { signerName, keyType }: Wanted): Promise<{ key: string; path: string }> {
  if (keyType !== "ECDSAP256") throw new NotThere(`key type ${keyType}: one that the process kubelet does not have`);
  const { namespace, name, uid } = pod.metadata;
  const { serviceAccountName, nodeName } = pod.spec;
  const account = Named.parse(await api.find(`/api/v1/namespaces/${namespace}/serviceaccounts/${serviceAccountName}`));
  const node = Named.parse(await api.find(`/api/v1/nodes/${nodeName}`));
  const keys = await webcrypto.subtle.generateKey(ALGORITHM, true, ["sign", "verify"]);
  const csr = await x509.Pkcs10CertificateRequestGenerator.create({ keys, signingAlgorithm: ALGORITHM }, webcrypto);
  const folder = `/apis/certificates.k8s.io/v1/namespaces/${namespace}/podcertificaterequests`;
  const spec = {
    signerName,
    podName: name,
    podUID: uid,
    serviceAccountName,
    serviceAccountUID: account.metadata.uid,
    nodeName,
    nodeUID: node.metadata.uid,
    stubPKCS10Request: Buffer.from(csr.rawData).toString("base64"),
  };
  const ownerReferences = [{ apiVersion: "v1", kind: "Pod", name, uid }];
  const body = {
    apiVersion: "certificates.k8s.io/v1",
    kind: "PodCertificateRequest",
    metadata: { generateName: "req-", namespace, ownerReferences },
    spec,
  };
  const made = Named.parse(await api.ask({ method: "POST", path: folder, body }));
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey));
  const key = createPrivateKey({ key: pkcs8, type: "pkcs8", format: "der" }).export({ type: "pkcs8", format: "pem" });
  return { key: key.toString(), path: `${folder}/${made.metadata.name}` };
}
