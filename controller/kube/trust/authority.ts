// The certificate authority of an installation: what it is made of, how it gives way to the next, and what it signs. Knows no
// Kubernetes and keeps no state; secrets.ts stores it, issue.ts decides who gets what.
//
//   A1  serial numbers are random; a name of an authority is used once, so that two of one bundle are told apart.
//   A2  the next authority stands in the bundle for OVERLAP_MS before it signs, the former one until it expires: whoever read
//       a bundle within that time trusts every certificate that is valid.
//   A3  nothing that is signed outlives its signer.
import "reflect-metadata";
import { createPrivateKey, randomBytes, webcrypto, X509Certificate } from "node:crypto";
import * as x509 from "@peculiar/x509";
import { FaultError, invalid } from "../../../proto/fault.ts";
import { type Identity, type TlsMaterial, uriOf } from "../../../proto/trust.ts";

const DAY_MS = 86_400_000;
export const AUTHORITY_MS = 3650 * DAY_MS;
/** The next one is made so long before the end. */
export const RENEW_BEFORE_MS = 365 * DAY_MS;
/** Longer than the life of a pod's certificate, far longer than kubelets take to show a changed ConfigMap. */
export const OVERLAP_MS = 2 * DAY_MS;
/** Of certificates of pods. */
export const LEAF_MS = DAY_MS;
/** Clocks of two machines may be apart by this. */
const SKEW_MS = 300_000;
const BUNDLE_MAX = 8;
const PEM = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g;
const ALGORITHM = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };

x509.cryptoProvider.set(webcrypto);

/** PEM. */
export type KeyPair = { cert: string; key: string };

/** `next` is trusted already and signs later; `former` are trusted still. */
export type Authority = { signer: KeyPair; next: KeyPair | undefined; former: readonly string[] };

/** PEM of all that is to be trusted now. */
export function bundleOf({ signer, next, former }: Authority): string {
  return [signer.cert, ...(next === undefined ? [] : [next.cert]), ...former].map((pem) => `${pem.trim()}\n`).join("");
}

export async function makeAuthority(nowMs: number): Promise<Authority> {
  return { signer: await makeSigner(nowMs), next: undefined, former: [] };
}

/** What it is to be at this time; the same object where nothing changes. */
export async function turned(authority: Authority, nowMs: number): Promise<Authority> {
  const { signer, next } = authority;
  const former = authority.former.filter((pem) => new X509Certificate(pem).validToDate.getTime() > nowMs);
  const current = former.length === authority.former.length ? authority : { ...authority, former };
  if (next !== undefined) {
    const trustedSinceMs = new X509Certificate(next.cert).validFromDate.getTime() + SKEW_MS;
    if (nowMs < trustedSinceMs + OVERLAP_MS) return current;
    return { signer: next, next: undefined, former: [signer.cert, ...former].slice(0, BUNDLE_MAX - 2) };
  }
  const endMs = new X509Certificate(signer.cert).validToDate.getTime();
  return nowMs < endMs - RENEW_BEFORE_MS ? current : { ...current, next: await makeSigner(nowMs) };
}

export type Wanted = {
  identity: Identity;
  /** Names and addresses for those who look at them (NATS clients); Muster's own links look at the identity alone. */
  dns: readonly string[];
  ips: readonly string[];
  /** Default: so much before now as two clocks may be apart. */
  notBeforeMs?: number;
  notAfterMs: number;
};

/** DER of the leaf. Good for both ends of a connection. */
export async function sign(
  { signer }: Authority,
  publicKey: x509.PublicKeyType,
  wanted: Wanted,
  nowMs: number,
): Promise<{ der: Buffer; notAfterMs: number }> {
  const issuer = new x509.X509Certificate(signer.cert);
  const notAfter = new Date(Math.min(wanted.notAfterMs, issuer.notAfter.getTime()));
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: serialNumber(),
    subject: `CN=muster-${wanted.identity.role}`,
    issuer: issuer.subject,
    notBefore: new Date(Math.max(wanted.notBeforeMs ?? nowMs - SKEW_MS, issuer.notBefore.getTime())),
    notAfter,
    publicKey,
    signingKey: await signingKey(signer.key),
    signingAlgorithm: ALGORITHM,
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.serverAuth, x509.ExtendedKeyUsage.clientAuth]),
      new x509.SubjectAlternativeNameExtension([
        { type: "url", value: uriOf(wanted.identity) },
        ...wanted.dns.map((value) => ({ type: "dns" as const, value })),
        ...wanted.ips.map((value) => ({ type: "ip" as const, value })),
      ]),
      await x509.AuthorityKeyIdentifierExtension.create(issuer),
    ],
  });
  return { der: Buffer.from(certificate.rawData), notAfterMs: notAfter.getTime() };
}

/** A key and its certificate in one: for processes that have the authority themselves. */
export async function makeLeaf(authority: Authority, wanted: Wanted, nowMs: number): Promise<TlsMaterial> {
  const keys = await webcrypto.subtle.generateKey(ALGORITHM, true, ["sign", "verify"]);
  const { der } = await sign(authority, keys.publicKey, wanted, nowMs);
  return { ca: bundleOf(authority), cert: pemOf(der), key: await keyPem(keys.privateKey) };
}

export function pemOf(der: Buffer): string {
  return new X509Certificate(der).toString();
}

/** Throws a FaultError that names the field. `title`: of where it was read from. */
export function readAuthority(data: Readonly<Record<string, string>>, title: string, nowMs: number): Authority {
  const refuse = (field: string, detail: string): never => {
    throw new FaultError(invalid(`${title}: ${field}`, `${detail}; delete the Secret to have a new one made`));
  };
  const pair = (certField: string, keyField: string): KeyPair => {
    const cert = data[certField] ?? "";
    const key = data[keyField] ?? "";
    const why = whyNoSigner({ cert, key }, nowMs);
    return why === undefined ? { cert, key } : refuse(why.isKey ? keyField : certField, why.detail);
  };
  const signer = pair("tls.crt", "tls.key");
  const next = data["next.crt"] === undefined ? undefined : pair("next.crt", "next.key");
  const bundle = data["ca.crt"]?.match(PEM) ?? [];
  if (bundle.length > BUNDLE_MAX) refuse("ca.crt", `it holds more than ${BUNDLE_MAX} certificates`);
  const fingerprint = (pem: string) => new X509Certificate(pem).fingerprint256;
  const own = [signer, next].flatMap((each) => (each === undefined ? [] : fingerprint(each.cert)));
  try {
    return { signer, next, former: bundle.filter((pem) => !own.includes(fingerprint(pem))) };
  } catch (error) {
    return refuse("ca.crt", error instanceof Error ? error.message : String(error));
  }
}

/** As `readAuthority` takes it. */
export function authorityData(authority: Authority): Record<string, string> {
  const { signer, next } = authority;
  return {
    "ca.crt": bundleOf(authority),
    "tls.crt": signer.cert,
    "tls.key": signer.key,
    ...(next === undefined ? {} : { "next.crt": next.cert, "next.key": next.key }),
  };
}

function whyNoSigner({ cert, key }: KeyPair, nowMs: number): { isKey: boolean; detail: string } | undefined {
  const certificate = orError(() => new X509Certificate(cert));
  if (certificate instanceof Error) return { isKey: false, detail: `it is no certificate: ${certificate.message}` };
  const privateKey = orError(() => createPrivateKey(key));
  if (privateKey instanceof Error) return { isKey: true, detail: `it is no private key: ${privateKey.message}` };
  if (!certificate.ca) return { isKey: false, detail: "it is not a certificate of an authority" };
  if (privateKey.asymmetricKeyDetails?.namedCurve !== "prime256v1")
    return { isKey: true, detail: "it is no P-256 key" };
  if (!certificate.checkPrivateKey(privateKey)) return { isKey: true, detail: "it is not the key of the certificate" };
  if (certificate.validToDate.getTime() <= nowMs)
    return { isKey: false, detail: `it has expired on ${certificate.validTo}` };
  return undefined;
}

function orError<T>(read: () => T): T | Error {
  try {
    return read();
  } catch (error) {
    return error instanceof Error ? error : new Error(String(error));
  }
}

async function makeSigner(nowMs: number): Promise<KeyPair> {
  const keys = await webcrypto.subtle.generateKey(ALGORITHM, true, ["sign", "verify"]);
  const serial = serialNumber();
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    serialNumber: serial,
    name: `CN=muster-ca-${serial.slice(0, 12)}`,
    notBefore: new Date(nowMs - SKEW_MS),
    notAfter: new Date(nowMs + AUTHORITY_MS),
    keys,
    signingAlgorithm: ALGORITHM,
    extensions: [
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
  return { cert: pemOf(Buffer.from(certificate.rawData)), key: await keyPem(keys.privateKey) };
}

/** Positive, 16 bytes, of which the first is never 0: DER would shorten it. */
function serialNumber(): string {
  const bytes = randomBytes(16);
  bytes[0] = ((bytes[0] ?? 0) & 0x7f) | 0x40;
  return bytes.toString("hex");
}

function signingKey(pem: string): Promise<webcrypto.CryptoKey> {
  const pkcs8 = createPrivateKey(pem).export({ type: "pkcs8", format: "der" });
  return webcrypto.subtle.importKey("pkcs8", pkcs8, ALGORITHM, false, ["sign"]);
}

async function keyPem(key: webcrypto.CryptoKey): Promise<string> {
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", key));
  return createPrivateKey({ key: pkcs8, type: "pkcs8", format: "der" })
    .export({ type: "pkcs8", format: "pem" })
    .toString();
}
