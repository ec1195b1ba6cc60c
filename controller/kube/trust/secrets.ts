// The two Secrets that the controller makes in its release's namespace: `muster-ca`, the authority, and `muster-nats`, what the
// broker serves with. Owns their form, and that of several controllers that begin at once all use one authority.
//
//   S1  the first one stored wins: whoever comes second reads it and forgets its own.
//   S2  what is stored and cannot be read is never written over: a person decides whether all certificates are to end.
//   S3  changes name the version that was read; who was overtaken reads again.
import { randomBytes, X509Certificate } from "node:crypto";
import { FaultError, invalid } from "../../../proto/fault.ts";
import { isAlreadyThere, isConflict, isTransient, type KubeApi, type KubeObject } from "../api/client.ts";
import { textsOf } from "../api/fields.ts";
import { secrets } from "../api/resources.ts";
import {
  type Authority,
  authorityData,
  bundleOf,
  makeAuthority,
  makeLeaf,
  readAuthority,
  turned,
} from "./authority.ts";

export const AUTHORITY_SECRET = "muster-ca";
export const NATS_SECRET = "muster-nats";
/** Who clients of the broker are; its password is the token of the Secret. */
export const NATS_USER = "muster";

/** Rounds of reading and writing against others who do the same. */
const ROUNDS_MAX = 8;
const TOKEN_BYTES = 32;
const TOKEN = /^[A-Za-z0-9_-]{16,128}$/;

export type SecretsOptions = { api: KubeApi; namespace: string; nowMs: () => number };
export type Broker = { token: string };
type Stored = { object: KubeObject; data: Readonly<Record<string, string>> };

/** The authority as it is stored after this, made or carried on where it is due. Throws FaultError (S2) or KubeError. */
export async function keepAuthority(
  options: SecretsOptions,
  known: Authority | undefined,
  signal: AbortSignal,
): Promise<Authority> {
  const { nowMs, namespace } = options;
  return settle(async () => {
    const stored = await read(options, AUTHORITY_SECRET, signal);
    const title = `Secret ${namespace}/${AUTHORITY_SECRET}`;
    const found = stored === undefined ? known : readAuthority(stored.data, title, nowMs());
    const wanted = await turned(found ?? (await makeAuthority(nowMs())), nowMs());
    if (stored === undefined || wanted !== found) {
      await write(options, AUTHORITY_SECRET, { stored, data: authorityData(wanted) }, signal);
    }
    return wanted;
  });
}

/** The broker's Secret with a certificate of this authority; the token stays what it was. `known`: before the Secret went. */
export async function keepBroker(
  options: SecretsOptions,
  authority: Authority,
  known: Broker | undefined,
  signal: AbortSignal,
): Promise<Broker> {
  const { nowMs, namespace } = options;
  return settle(async () => {
    const stored = await read(options, NATS_SECRET, signal);
    const token = stored?.data.token ?? known?.token ?? randomBytes(TOKEN_BYTES).toString("base64url");
    if (!TOKEN.test(token)) {
      const field = `Secret ${namespace}/${NATS_SECRET}: token`;
      throw new FaultError(invalid(field, "16 to 128 letters, digits, - and _ are needed; delete it to have one made"));
    }
    if (stored === undefined || stored.data.token !== token || !isCurrent(stored.data, authority)) {
      const leaf = await makeLeaf(authority, brokerOf(namespace), nowMs());
      const data = { "tls.crt": leaf.cert, "tls.key": leaf.key, "ca.crt": leaf.ca, token };
      await write(options, NATS_SECRET, { stored, data }, signal);
    }
    return { token };
  });
}

/** As long as its authority (A3): a server does not read its files again by itself. */
function brokerOf(namespace: string) {
  const zones = [namespace, `${namespace}.svc`, `${namespace}.svc.cluster.local`];
  const service = zones.map((zone) => `${NATS_SECRET}.${zone}`);
  return {
    identity: { role: "nats", namespace, name: NATS_SECRET, podUid: "service" } as const,
    dns: [NATS_SECRET, ...service, ...service.map((name) => `*.${name}`)],
    ips: [],
    notAfterMs: Number.POSITIVE_INFINITY,
  };
}

function isCurrent(data: Stored["data"], authority: Authority): boolean {
  if (data["ca.crt"] !== bundleOf(authority)) return false;
  try {
    const leaf = new X509Certificate(data["tls.crt"] ?? "");
    return leaf.verify(new X509Certificate(authority.signer.cert).publicKey) && (data["tls.key"] ?? "") !== "";
  } catch {
    return false; // whatever it is, it is no certificate: it is made anew
  }
}

/** Again where another has written between our read and our write, or an answer was lost. */
async function settle<T>(round: () => Promise<T>): Promise<T> {
  for (let rounds = 1; ; rounds += 1) {
    try {
      return await round();
    } catch (error) {
      const isOvertaken = isConflict(error) || isAlreadyThere(error) || (isTransient(error) && error.code !== 429);
      if (!isOvertaken || rounds >= ROUNDS_MAX) throw error;
    }
  }
}

async function read(
  { api, namespace }: SecretsOptions,
  name: string,
  signal: AbortSignal,
): Promise<Stored | undefined> {
  const object = await api.get(secrets, name, namespace, signal);
  if (object === undefined) return undefined;
  const encoded = Object.entries(textsOf(object.data));
  const data = Object.fromEntries(encoded.map(([key, value]) => [key, Buffer.from(value, "base64").toString("utf8")]));
  return { object, data };
}

async function write(
  { api, namespace }: SecretsOptions,
  name: string,
  { stored, data }: { stored: Stored | undefined; data: Record<string, string> },
  signal: AbortSignal,
): Promise<void> {
  const encoded = Object.fromEntries(
    Object.entries(data).map(([key, value]) => [key, Buffer.from(value).toString("base64")]),
  );
  if (stored !== undefined) {
    await api.replace(secrets, { ...stored.object, data: encoded }, signal);
    return;
  }
  const labels = { "app.kubernetes.io/name": "muster", "app.kubernetes.io/managed-by": "muster" };
  const object = { apiVersion: "v1", kind: "Secret", metadata: { name, namespace, labels }, type: "Opaque" };
  await api.create(secrets, { ...object, data: encoded }, signal);
}
