import { X509Certificate } from "node:crypto";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  AUTHORITY_MS,
  type Authority,
  authorityData,
  bundleOf,
  LEAF_MS,
  makeAuthority,
  makeLeaf,
  OVERLAP_MS,
  RENEW_BEFORE_MS,
  readAuthority,
  turned,
} from "../../../../controller/kube/trust/authority.ts";
import { identityIn, renewalMs } from "../../../../proto/trust.ts";

const START_MS = Date.UTC(2026, 10, 25);
const HOUR_MS = 3_600_000;
const identity = { role: "worker", namespace: "models", name: "chat-0", podUid: "uid-1" } as const;
const leafOf = async (authority: Authority, nowMs: number, notAfterMs = nowMs + LEAF_MS) => {
  const material = await makeLeaf(
    authority,
    { identity, dns: ["a.b.svc"], ips: ["10.0.0.9", "fd00::9"], notAfterMs },
    nowMs,
  );
  return { material, certificate: new X509Certificate(material.cert) };
};
const certificatesOf = (bundle: string) =>
  (bundle.match(/-----BEGIN[^-]+-----[^-]+-----END CERTIFICATE-----/g) ?? []).map((pem) => new X509Certificate(pem));
const isTrusted = (leaf: X509Certificate, bundle: string): boolean =>
  certificatesOf(bundle).some((each) => leaf.issuer === each.subject && leaf.verify(each.publicKey));

describe("an authority", () => {
  test("A1: is of its own name and number; ten years long, on P-256, and signs no other authority", async () => {
    const [one, other] = await Promise.all([makeAuthority(START_MS), makeAuthority(START_MS)]);
    const [a, b] = [new X509Certificate(one.signer.cert), new X509Certificate(other.signer.cert)];
    expect(a.subject).not.toBe(b.subject);
    expect(a.serialNumber).not.toBe(b.serialNumber);
    expect(a.serialNumber.length).toBe(32);
    expect([a.ca, a.publicKey.asymmetricKeyDetails?.namedCurve]).toEqual([true, "prime256v1"]);
    expect(a.validToDate.getTime()).toBe(START_MS + AUTHORITY_MS);
    const leaf = (await leafOf(one, START_MS)).certificate;
    expect([leaf.verify(a.publicKey), leaf.verify(b.publicKey), leaf.ca]).toEqual([true, false, false]);
  });

  test("a leaf says who, for both ends, with names and addresses, for a day", async () => {
    const { certificate, material } = await leafOf(await makeAuthority(START_MS), START_MS);
    expect(identityIn(certificate.subjectAltName)).toEqual(identity);
    expect(certificate.checkHost("a.b.svc")).toBe("a.b.svc");
    expect([certificate.checkIP("10.0.0.9"), certificate.checkIP("fd00::9")]).toEqual(["10.0.0.9", "fd00::9"]);
    expect(certificate.keyUsage).toEqual(["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"]);
    expect(certificate.validToDate.getTime()).toBe(START_MS + LEAF_MS);
    expect(renewalMs(material.cert)).toBeGreaterThan(START_MS + 15 * HOUR_MS);
    expect(renewalMs(material.cert)).toBeLessThan(START_MS + 17 * HOUR_MS);
  });

  test("A3: nothing outlives its signer", async () => {
    const { certificate } = await leafOf(await makeAuthority(START_MS), START_MS, Number.POSITIVE_INFINITY);
    expect(certificate.validToDate.getTime()).toBe(START_MS + AUTHORITY_MS);
  });
});

describe("A2: the turn to the next authority", () => {
  test("stays the same object while nothing is due", async () => {
    const authority = await makeAuthority(START_MS);
    expect(await turned(authority, START_MS + AUTHORITY_MS - RENEW_BEFORE_MS - HOUR_MS)).toBe(authority);
  });

  test("is announced, then signs, then the former goes when it has expired", async () => {
    const authority = await makeAuthority(START_MS);
    const dueMs = START_MS + AUTHORITY_MS - RENEW_BEFORE_MS;
    const announced = await turned(authority, dueMs);
    expect(announced.signer).toBe(authority.signer);
    expect(certificatesOf(bundleOf(announced)).length).toBe(2);
    expect(await turned(announced, dueMs + OVERLAP_MS - 1)).toBe(announced);
    const signing = await turned(announced, dueMs + OVERLAP_MS);
    expect(signing).toEqual({ signer: announced.next, next: undefined, former: [authority.signer.cert] });
    expect(bundleOf(signing).split("-----END").length).toBe(3);
    const alone = await turned(signing, START_MS + AUTHORITY_MS);
    expect(alone).toEqual({ signer: announced.next, next: undefined, former: [] });
  });

  test("whoever read a bundle within the overlap trusts every leaf that is valid", async () => {
    const dueMs = START_MS + AUTHORITY_MS - RENEW_BEFORE_MS;
    const states: { atMs: number; authority: Authority }[] = [];
    let authority = await makeAuthority(START_MS);
    for (let atMs = dueMs - 4 * LEAF_MS; atMs < dueMs + OVERLAP_MS + 4 * LEAF_MS; atMs += 3 * HOUR_MS) {
      authority = await turned(authority, atMs);
      states.push({ atMs, authority });
    }
    expect(new Set(states.map((each) => each.authority.signer.cert)).size).toBe(2);
    const leaves = await Promise.all(
      states.map(async (each) => ({ ...each, leaf: (await leafOf(each.authority, each.atMs)).certificate })),
    );
    fc.assert(
      fc.property(fc.nat(states.length - 1), fc.nat(states.length - 1), (read, issued) => {
        const reader = states[read];
        const issuer = leaves[issued];
        if (reader === undefined || issuer === undefined) return;
        // It is looked at from when both are there until the leaf ends, by a bundle that is at most the overlap old.
        const fromMs = Math.max(reader.atMs, issuer.atMs);
        if (fromMs > issuer.leaf.validToDate.getTime() || fromMs - reader.atMs >= OVERLAP_MS) return;
        expect(isTrusted(issuer.leaf, bundleOf(reader.authority))).toBe(true);
      }),
      { numRuns: 2_000 },
    );
  });
});

describe("what is stored", () => {
  test("is read back as it was, in each state", async () => {
    const authority = await makeAuthority(START_MS);
    const announced = { ...authority, next: (await makeAuthority(START_MS)).signer };
    const former = { ...announced, former: [(await makeAuthority(START_MS)).signer.cert.trim()] };
    for (const each of [authority, announced, former])
      expect(readAuthority(authorityData(each), "Secret a/b", START_MS)).toEqual(each);
  });

  test("is refused by the name of the field that is wrong", async () => {
    const data = authorityData(await makeAuthority(START_MS));
    const other = authorityData(await makeAuthority(START_MS));
    const leaf = (await leafOf(await makeAuthority(START_MS), START_MS)).material;
    const wrong: [Record<string, string>, string][] = [
      [{}, "tls.crt: it is no certificate"],
      [{ ...data, "tls.crt": "x" }, "tls.crt: it is no certificate"],
      [{ ...data, "tls.key": "x" }, "tls.key: it is no private key"],
      [{ ...data, "tls.key": other["tls.key"] ?? "" }, "tls.key: it is not the key"],
      [{ ...data, "tls.crt": leaf.cert, "tls.key": leaf.key }, "tls.crt: it is not a certificate of an authority"],
      [{ ...data, "next.crt": other["tls.crt"] ?? "" }, "next.key: it is no private key"],
      [{ ...data, "ca.crt": (data["ca.crt"] ?? "").repeat(9) }, "ca.crt: it holds more than"],
    ];
    for (const [stored, why] of wrong)
      expect(() => readAuthority(stored, "Secret a/b", START_MS)).toThrow(`Secret a/b: ${why}`);
    expect(() => readAuthority(data, "Secret a/b", START_MS + AUTHORITY_MS)).toThrow("tls.crt: it has expired");
  });
});
