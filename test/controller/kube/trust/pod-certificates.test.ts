// From a kubelet's request to links: the signer over the simulated API server, its answers judged as the real one does
// (validation of certificates.k8s.io/v1: times, life, key), and used by the client that workers use.
import "reflect-metadata";
import { createPrivateKey, webcrypto, X509Certificate } from "node:crypto";
import { rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { status } from "@grpc/grpc-js";
import * as x509 from "@peculiar/x509";
import { expect, onTestFinished, test } from "vitest";
import { KubeError, type KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf, listOf, millisOf, textOf } from "../../../../controller/kube/api/fields.ts";
import { podCertificateRequests } from "../../../../controller/kube/api/resources.ts";
import { CREDENTIALS_FILE, enrol } from "../../../../proto/enrol.ts";
import { ask, serve } from "../../../proto/mutual-bed.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { until } from "../../../until.ts";
import { groupAt, RELEASE, signal, TrustTerm, workerRunning } from "./term.ts";

const P256 = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
const HOUR_MS = 3_600_000;

async function begin(watched?: string): Promise<TrustTerm> {
  const term = await TrustTerm.begin({ podCertificates: { watched } });
  term.stores.groups.put(groupAt("chat-0", 3));
  return term;
}

type Wish = {
  name?: string;
  pod?: KubeObject;
  spec?: object;
  algorithm?: { name: string; namedCurve: string; hash: string };
};

/** As a kubelet asks; answers the key in PEM. */
async function request(term: TrustTerm, { name = "req-1", pod = workerRunning(), spec = {}, algorithm = P256 }: Wish) {
  const keys = await webcrypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
  const csr = await x509.Pkcs10CertificateRequestGenerator.create({ keys, signingAlgorithm: algorithm }, webcrypto);
  const asked = {
    signerName: `muster.dev/${RELEASE}`,
    podName: pod.metadata.name,
    podUID: pod.metadata.uid,
    serviceAccountName: "muster-worker",
    maxExpirationSeconds: 86_400,
    stubPKCS10Request: Buffer.from(csr.rawData).toString("base64"),
    ...spec,
  };
  const object = {
    apiVersion: "certificates.k8s.io/v1",
    kind: "PodCertificateRequest",
    metadata: { name, namespace: "models" },
    spec: asked,
  };
  await term.server.create(podCertificateRequests, object, signal);
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey));
  return createPrivateKey({ key: pkcs8, type: "pkcs8", format: "der" })
    .export({ type: "pkcs8", format: "pem" })
    .toString();
}

const statusOf = (term: TrustTerm, name = "req-1") =>
  fieldsOf(term.server.objects(podCertificateRequests).find(({ metadata }) => metadata.name === name)?.status);

const conditionOf = (term: TrustTerm, name = "req-1") => fieldsOf(listOf(statusOf(term, name).conditions)[0]);

const answered = (term: TrustTerm, name = "req-1") =>
  term.till(() => conditionOf(term, name).type !== undefined, `${name} is answered`, 50);

test("a worker's pod gets a certificate before it runs; what the real server checks of it holds", async () => {
  const term = await begin();
  const pod = { ...workerRunning(), status: { phase: "Pending" } };
  term.stores.pods.put(pod);
  const key = await request(term, { pod, spec: { maxExpirationSeconds: 7_200 } });
  await answered(term);
  expect(conditionOf(term)).toMatchObject({ type: "Issued", status: "True" });
  const { certificateChain, notBefore, notAfter, beginRefreshAt } = statusOf(term);
  const leaf = new X509Certificate(textOf(certificateChain) ?? "");
  expect(leaf.subjectAltName).toContain("URI:muster://worker/models/chat-0/uid-chat-0-3-1");
  expect(leaf.checkPrivateKey(createPrivateKey(key))).toBe(true);
  expect(leaf.validFromDate.getTime()).toBe(millisOf(notBefore));
  expect(leaf.validToDate.getTime()).toBe(millisOf(notAfter));
  const [fromMs, toMs, refreshMs] = [notBefore, notAfter, beginRefreshAt].map((time) => millisOf(time) ?? 0);
  expect(Math.abs((fromMs ?? 0) - term.time.nowMs())).toBeLessThan(300_000);
  expect((toMs ?? 0) - (fromMs ?? 0)).toBe(7_200_000);
  expect(refreshMs).toBe((fromMs ?? 0) + HOUR_MS);
});

test("R1, R2: another's UID, account, annotations or kind of key are denied by name; one of a stranger's signer is left", async () => {
  const term = await begin();
  term.stores.pods.put(workerRunning());
  const P384 = { name: "ECDSA", namedCurve: "P-384", hash: "SHA-384" };
  await request(term, { name: "uid", spec: { podUID: "uid-before" } });
  await request(term, { name: "account", spec: { serviceAccountName: "default" } });
  await request(term, { name: "annotated", spec: { unverifiedUserAnnotations: { "a.b/c": "d" } } });
  await request(term, { name: "key", algorithm: P384 });
  await request(term, { name: "foreign", spec: { signerName: "muster.dev/another" } });
  for (const name of ["uid", "account", "annotated", "key"]) await answered(term, name);
  expect(conditionOf(term, "uid")).toMatchObject({ type: "Denied", message: expect.stringContaining("uid-before") });
  expect(conditionOf(term, "account")).toMatchObject({ type: "Denied", message: expect.stringContaining("default") });
  expect(conditionOf(term, "annotated")).toMatchObject({ reason: "InvalidUnverifiedUserAnnotations" });
  expect(conditionOf(term, "key")).toMatchObject({
    reason: "UnsupportedKeyType",
    message: expect.stringContaining("ECDSAP256"),
  });
  expect(statusOf(term, "uid").certificateChain).toBeUndefined();
  await term.time.runFor(5_000);
  expect(conditionOf(term, "foreign")).toEqual({});
});

test("R2: a request that came before the news of its pod waits for it, and not for ever", async () => {
  const term = await begin();
  const late = workerRunning({ worker: 0 });
  await request(term, { pod: late });
  await request(term, { name: "orphan", spec: { podName: "nobody", podUID: "uid-nobody" } });
  await until(async () => {
    await term.time.runFor(100);
    return term.news.some((each) => each.includes("is not there"));
  }, "it is said once");
  term.stores.pods.put({ ...late, metadata: { ...late.metadata, resourceVersion: "12" } });
  await answered(term);
  expect(conditionOf(term)).toMatchObject({ type: "Issued" });
  await term.time.runFor(901_000);
  expect(term.news.filter((each) => each.includes("models/nobody"))).toHaveLength(1);
  term.stores.pods.put(workerRunning({ worker: 1 }));
  expect(conditionOf(term, "orphan")).toEqual({});
});

test("where the server has no such requests nobody is told of a signer", async () => {
  const { defaultKinds } = await import("../../../sim/kinds.ts");
  const kinds = defaultKinds().filter(({ resource }) => resource !== podCertificateRequests);
  const time = new VirtualClock(Date.now());
  const old = await TrustTerm.begin({
    time,
    server: new SimApiServer(time, { kinds }),
    podCertificates: { watched: undefined },
  });
  expect(old.opened.signer).toBeUndefined();
  expect((await begin()).opened.signer).toBe(`muster.dev/${RELEASE}`);
  expect((await TrustTerm.begin()).opened.signer).toBeUndefined();
});

test("a controller that may not list them says so and names no signer: its workers enrol", async () => {
  const time = new VirtualClock(Date.now());
  const server = new SimApiServer(time);
  const list = server.list.bind(server);
  server.list = async (resource, options, until) => {
    if (resource === podCertificateRequests)
      throw new KubeError(403, "Forbidden", "cannot list podcertificaterequests");
    return list(resource, options, until);
  };
  const term = await TrustTerm.begin({ time, server, podCertificates: { watched: undefined } });
  expect(term.opened.signer).toBeUndefined();
  expect(term.troubles).toEqual([expect.stringContaining("cannot list podcertificaterequests")]);
});

test("E2: what the kubelet brings is used without a word to the controller, renewed with the file, and replaced by the token where it does not come", async () => {
  const term = await begin();
  const pod = workerRunning();
  term.stores.pods.put(pod);
  const bundle = term.opened.trust.nats()?.ca ?? "";
  const folder = term.folder(await term.keys.tokenOf(pod), bundle);
  const bring = async (name: string): Promise<string> => {
    const key = await request(term, { name, pod });
    await answered(term, name);
    const chain = textOf(statusOf(term, name).certificateChain) ?? "";
    writeFileSync(join(folder, CREDENTIALS_FILE), `${key}${chain}`);
    return chain;
  };
  const first = await bring("first");
  const stop = new AbortController();
  onTestFinished(() => stop.abort());
  const trust = await enrol({ folder, address: term.enrol, lookMs: 50 }, stop.signal);
  expect([trust.nats().cert.trim(), term.keys.reads]).toEqual([first.trim(), []]);
  const address = await serve(trust.server(["controller"]));
  const wished = { role: "worker", podUid: "uid-chat-0-3-1", namespace: "models", group: "chat-0" } as const;
  expect(await ask(address, term.opened.trust.channel(wished))).toBe("ok");
  expect(await ask(address, trust.channel({ role: "worker" }))).toMatchObject({ code: status.UNAUTHENTICATED });
  const second = await bring("second");
  await until(() => trust.nats().cert.trim() === second.trim(), "the second is used");
  rmSync(join(folder, CREDENTIALS_FILE));
  await until(() => term.keys.reads.length > 0 && trust.nats().cert.trim() !== second.trim(), "it helps itself");
  expect(trust.identity.podUid).toBe("uid-chat-0-3-1");
});
