// How worker and gateway come by a certificate and keep it: their kubelet puts one into the identity folder, or the pod's token
// and a fresh key go to the controller and a short-lived certificate comes back. Owns the folder's reading and the renewals.
//
//   E1  a key that is made here never leaves the process, and is used for one certificate.
//   E2  renewal begins when a third of the life is left, and goes on until it succeeds; what is valid is used meanwhile. A
//       kubelet renews before that: what it brings is used at once, and where it brings nothing in time the token is.
//   E3  the server is believed by the bundle of the folder alone; the bundle that comes with a certificate adds to it.
import "reflect-metadata";
import { createPrivateKey, webcrypto, X509Certificate } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Metadata, type ServiceError } from "@grpc/grpc-js";
import * as x509 from "@peculiar/x509";
import { CertificatesClient, type IssueResponse } from "./gen/muster/v1/trust.ts";
import { channelOptions } from "./grpc.ts";
import { enrolCredentials, MutualTrust, renewalMs, type TlsMaterial } from "./trust.ts";

const ALGORITHM = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
const CALL_MS = 10_000;
const BACKOFF = { baseMs: 200, maxMs: 10_000 };
/** Kubelets show a changed ConfigMap within a minute or two; looking costs one read. */
const LOOK_MS = 10_000;
const FILE_BYTES_MAX = 256 * 1024;
const CERTIFICATES_MAX = 16;
const KEY = /-----BEGIN PRIVATE KEY-----[^-]+-----END PRIVATE KEY-----/;
const PEM = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;

export type EnrolOptions = {
  /** With `token` and `ca.crt`; CREDENTIALS_FILE where a kubelet brings it. */
  folder: string;
  /** host:port of `Certificates`. */
  address: string;
  lookMs?: number;
  /** Why there is none yet, or none anew; said when it changes. */
  onTrouble?: (detail: string) => void;
};

/** Key and certificates in PEM, as kubelets project them (podCertificate.credentialBundlePath). */
export const CREDENTIALS_FILE = "credentials.pem";

/** `bundle` and `held`: the folder's files as they were read. */
type Enrolled = { material: TlsMaterial; renewMs: number; bundle: string; held: string };

/** Resolves with the first certificate, then renews until the signal aborts. Rejects with its reason where it does before. */
export async function enrol(options: EnrolOptions, signal: AbortSignal): Promise<MutualTrust> {
  const first = await untilEnrolled(options, signal);
  const trust = new MutualTrust(first.material);
  void renew(options, trust, { last: first, signal });
  return trust;
}

async function renew(
  options: EnrolOptions,
  trust: MutualTrust,
  { last: first, signal }: { last: Enrolled; signal: AbortSignal },
): Promise<void> {
  const { folder, lookMs = LOOK_MS } = options;
  for (let last = first; !signal.aborted; ) {
    await sleep(Math.min(lookMs, Math.max(0, last.renewMs - Date.now())), signal);
    const bundle = await read(folder, "ca.crt").catch(() => last.bundle); // a volume in change: looked at again soon
    const held = await heldIn(folder).catch(() => last.held);
    if (signal.aborted) return;
    if (bundle !== last.bundle) {
      const ca = bundleOf(bundle, trust.nats().ca);
      const isTaken = attempt(() => trust.update({ ...trust.nats(), ca }));
      if (!isTaken) options.onTrouble?.("ca.crt: it cannot be read as certificates; the former bundle stays");
    } else if (held === last.held && Date.now() < last.renewMs) continue;
    try {
      last = await untilEnrolled(options, signal);
      trust.update(last.material);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }
}

/** Tries for ever, with back-off. */
async function untilEnrolled(options: EnrolOptions, signal: AbortSignal): Promise<Enrolled> {
  let said = "";
  for (let failures = 1; ; failures += 1) {
    signal.throwIfAborted();
    try {
      const enrolled = await once(options, signal);
      new MutualTrust(enrolled.material); // whole, ours, and of our key
      return enrolled;
    } catch (error) {
      signal.throwIfAborted();
      const detail = textOf(error);
      if (detail !== said) options.onTrouble?.(`no certificate from ${options.address}: ${detail}`);
      said = detail;
    }
    const whole = Math.min(BACKOFF.maxMs, BACKOFF.baseMs * 2 ** Math.min(failures - 1, 10));
    await sleep(whole * (0.5 + Math.random() / 2), signal);
  }
}

async function once({ folder, address }: EnrolOptions, signal: AbortSignal): Promise<Enrolled> {
  const [token, bundle, held] = await Promise.all([read(folder, "token"), read(folder, "ca.crt"), heldIn(folder)]);
  const brought = held === "" ? undefined : broughtBy(held, bundle);
  if (brought !== undefined && Date.now() < brought.renewMs) return { ...brought, bundle, held };
  const keys = await webcrypto.subtle.generateKey(ALGORITHM, true, ["sign", "verify"]);
  const wish = { name: "CN=muster", keys, signingAlgorithm: ALGORITHM };
  const request = await x509.Pkcs10CertificateRequestGenerator.create(wish, webcrypto);
  const client = new CertificatesClient(address, enrolCredentials(bundle, "controller"), channelOptions);
  try {
    const response = await issue(client, { token: token.trim(), requestDer: Buffer.from(request.rawData) }, signal);
    const cert = response.chainDer.map((der) => new X509Certificate(der).toString()).join("");
    const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey));
    const key = createPrivateKey({ key: pkcs8, type: "pkcs8", format: "der" }).export({ type: "pkcs8", format: "pem" });
    const nowMs = Date.now();
    const renewMs = nowMs + ((Number(response.notAfterUnixMs) - nowMs) * 2) / 3;
    const ca = bundleOf(bundle, response.bundlePem.toString());
    return { material: { ca, cert, key: key.toString() }, renewMs, bundle, held };
  } finally {
    client.close();
  }
}

/** What a kubelet has brought; empty: nothing. */
async function heldIn(folder: string): Promise<string> {
  try {
    return await read(folder, CREDENTIALS_FILE);
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return "";
    throw error;
  }
}

/** Throws where it cannot be read. */
function broughtBy(held: string, bundle: string): Pick<Enrolled, "material" | "renewMs"> {
  const key = KEY.exec(held)?.[0];
  const chain = held.match(PEM) ?? [];
  const [leaf] = chain;
  if (key === undefined || leaf === undefined)
    throw new Error(`${CREDENTIALS_FILE}: a private key and a certificate are needed`);
  const cert = chain.slice(0, CERTIFICATES_MAX).join("\n");
  return { material: { ca: bundleOf(bundle, ""), cert: `${cert}\n`, key }, renewMs: renewalMs(leaf) };
}

function issue(
  client: CertificatesClient,
  request: { token: string; requestDer: Buffer },
  signal: AbortSignal,
): Promise<IssueResponse> {
  return new Promise((done, fail) => {
    const bound = { deadline: Date.now() + CALL_MS };
    const call = client.issue(request, new Metadata(), bound, (error: ServiceError | null, response: IssueResponse) => {
      signal.removeEventListener("abort", cancel);
      if (error) fail(error);
      else done(response);
    });
    const cancel = () => call.cancel();
    signal.addEventListener("abort", cancel, { once: true });
    if (signal.aborted) cancel();
  });
}

/** Every certificate of both, once. Throws where there is none. */
function bundleOf(one: string, other: string): string {
  const all = [...new Set([...(one.match(PEM) ?? []), ...(other.match(PEM) ?? [])])].slice(0, CERTIFICATES_MAX);
  if (all.length === 0) throw new Error("ca.crt: it holds no certificate");
  return `${all.join("\n")}\n`;
}

async function read(folder: string, name: string): Promise<string> {
  const bytes = await readFile(join(folder, name));
  if (bytes.length === 0 || bytes.length > FILE_BYTES_MAX)
    throw new Error(`${join(folder, name)}: it has ${bytes.length} bytes; 1 to ${FILE_BYTES_MAX} are needed`);
  return bytes.toString("utf8");
}

function attempt(act: () => void): boolean {
  try {
    act();
    return true;
  } catch {
    return false;
  }
}

/** Ends at once when aborted. */
async function sleep(ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  const { promise, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, ms);
  const wake = () => resolve();
  signal.addEventListener("abort", wake, { once: true });
  await promise;
  clearTimeout(timer);
  signal.removeEventListener("abort", wake);
}

const textOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
