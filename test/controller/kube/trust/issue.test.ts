// From a pod's token to a link: the service on a port, asked by the client that worker and gateway use.
import { X509Certificate } from "node:crypto";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { describe, expect, onTestFinished, test } from "vitest";
import { systemClock } from "../../../../controller/kube/api/clock.ts";
import { bundleOf, makeAuthority } from "../../../../controller/kube/trust/authority.ts";
import { enrol } from "../../../../proto/enrol.ts";
import { CertificatesClient, type IssueResponse } from "../../../../proto/gen/muster/v1/trust.ts";
import { channelOptions } from "../../../../proto/grpc.ts";
import { enrolCredentials, noTrust } from "../../../../proto/trust.ts";
import { anonymous, ask, serve } from "../../../proto/mutual-bed.ts";
import { until } from "../../../until.ts";
import { ClusterKeys } from "./cluster-keys.ts";
import { gatewayRunning, groupAt, TrustTerm, workerRunning } from "./term.ts";

const ca = (term: TrustTerm): string => term.opened.trust.nats()?.ca ?? "";

async function bed(options: Parameters<typeof TrustTerm.begin>[0] = {}) {
  const term = await TrustTerm.begin(options);
  const pod = workerRunning();
  term.stores.groups.put(groupAt("chat-0", 3));
  term.stores.pods.put(pod);
  term.stores.pods.put(gatewayRunning());
  return { term, pod };
}

/** Enrols as a program of a pod does; ends with the test. */
async function enrolled(term: TrustTerm, token: string, more: { lookMs?: number; bundle?: string } = {}) {
  const stop = new AbortController();
  onTestFinished(() => stop.abort());
  const { bundle = ca(term), ...options } = more;
  const troubles: string[] = [];
  const folder = term.folder(token, bundle);
  const onTrouble = (detail: string) => troubles.push(detail);
  const trust = enrol({ folder, address: term.enrol, onTrouble, ...options }, stop.signal);
  trust.catch(() => {});
  return { trust, folder, troubles, stop };
}

type Asked = { token?: string; requestDer?: Buffer };

async function issue(term: TrustTerm, asked: Asked): Promise<IssueResponse | ServiceError> {
  const client = new CertificatesClient(term.enrol, enrolCredentials(ca(term), "controller"), channelOptions);
  onTestFinished(() => client.close());
  const request = { token: "", requestDer: Buffer.alloc(0), ...asked };
  return new Promise((done) =>
    client.issue(request, new Metadata(), { deadline: Date.now() + 10_000 }, (error, response) =>
      done(error ?? response),
    ),
  );
}

describe("certificates", () => {
  test("I1: worker and gateway get their own, and reach each other and the controller by them", async () => {
    const { term, pod } = await bed();
    const worker = await (await enrolled(term, await term.keys.tokenOf(pod))).trust;
    const gateway = await (await enrolled(term, await term.keys.tokenOf(gatewayRunning()))).trust;
    expect(worker.identity).toEqual({ role: "worker", namespace: "models", name: "chat-0", podUid: "uid-chat-0-3-1" });
    expect(gateway.identity).toMatchObject({ role: "gateway", podUid: "uid-gateway" });
    const address = await serve(worker.server(["controller", "gateway"]));
    const wished = { role: "worker", podUid: "uid-chat-0-3-1", namespace: "models", group: "chat-0" } as const;
    expect(await ask(address, gateway.channel(wished))).toBe("ok");
    expect(await ask(address, term.opened.trust.channel(wished))).toBe("ok");
    expect(await ask(address, worker.channel({ role: "worker" }))).toMatchObject({ code: status.UNAUTHENTICATED });
    const reports = await serve(term.opened.trust.server(["worker"]));
    expect(await ask(reports, worker.channel({ role: "controller" }))).toBe("ok");
    expect(await ask(reports, gateway.channel({ role: "controller" }))).toMatchObject({ code: status.UNAUTHENTICATED });
  });

  test("I2: enrolling anew costs the API server nothing", async () => {
    const { term, pod } = await bed();
    await (await enrolled(term, await term.keys.tokenOf(pod))).trust;
    const reads = term.keys.reads.length;
    let changes = 0;
    term.server.onChange(() => {
      changes += 1;
    });
    for (let again = 0; again < 3; again++) await (await enrolled(term, await term.keys.tokenOf(pod))).trust;
    expect([term.keys.reads.length - reads, changes]).toEqual([0, 0]);
  });

  test("a token that is not the pod's own is answered with the reason", async () => {
    const { term, pod } = await bed();
    const { keys } = term;
    const name = { name: pod.metadata.name, uid: pod.metadata.uid ?? "" };
    const refused: [string, string][] = [
      [await keys.token({ pod: { ...name, uid: "uid-before" } }), "the token is of uid-before"],
      [await keys.token({ pod: name, account: "default" }), "runs as muster-worker"],
      [await keys.token({ pod: name, audience: "vault" }), "aud"],
      [await (await ClusterKeys.make()).tokenOf(pod), "not valid"],
    ];
    for (const [token, why] of refused) {
      const { troubles, stop } = await enrolled(term, token);
      await until(() => troubles.length > 0, "the refusal is told");
      expect(troubles[0]).toContain(why);
      expect(troubles[0]).toContain("UNAUTHENTICATED");
      stop.abort();
    }
  });

  test("a pod that the watch has not brought yet gets its certificate once it has", async () => {
    const { term, pod } = await bed();
    const early = workerRunning({ worker: 0 });
    const { trust, troubles } = await enrolled(term, await term.keys.tokenOf(early));
    await until(() => troubles.some((each) => each.includes("is not there")), "it is told to wait");
    term.stores.pods.put({ ...early, metadata: { ...early.metadata, resourceVersion: "12" } });
    expect((await trust).identity.podUid).toBe("uid-chat-0-3-0");
    expect(pod.metadata.uid).not.toBe("uid-chat-0-3-0");
  });

  test("E3: a server of another authority is not believed, and gets no token", async () => {
    const { term, pod } = await bed();
    const other = bundleOf(await makeAuthority(Date.now()));
    const { troubles } = await enrolled(term, await term.keys.tokenOf(pod), { bundle: other });
    await until(() => troubles.length > 0, "it is said");
    expect(troubles[0]).toContain("UNAVAILABLE");
    expect([term.news, term.keys.reads]).toEqual([[], []]);
  });

  test("I3: what is no request is refused by the name of its field; clear text is not answered", async () => {
    const { term, pod } = await bed();
    const token = await term.keys.tokenOf(pod);
    const asked: [Asked, string][] = [
      [{ requestDer: Buffer.from("x") }, "token"],
      [{ token: "t".repeat(40_000) }, "token"],
      [{ token }, "request_der"],
      [{ token, requestDer: Buffer.alloc(5_000, 1) }, "request_der"],
      [{ token, requestDer: Buffer.from("this is no DER") }, "request_der: it is no PKCS#10"],
    ];
    for (const [request, field] of asked)
      expect(await issue(term, request)).toMatchObject({
        code: status.INVALID_ARGUMENT,
        details: expect.stringContaining(field),
      });
    expect(await issue(term, { token: "t".repeat(100_000) })).toMatchObject({ code: status.RESOURCE_EXHAUSTED });
    expect(await ask(term.enrol, noTrust.channel({ role: "controller" }))).toMatchObject({ code: status.UNAVAILABLE });
    expect(await ask(term.enrol, anonymous(bundleOf(await makeAuthority(Date.now()))))).toMatchObject({
      code: status.UNAVAILABLE,
    });
  });

  test("I3: one pod cannot have more than a few in a row; another gets its own", async () => {
    const { term, pod } = await bed();
    const token = await term.keys.tokenOf(pod);
    for (let count = 0; count < 5; count++) await (await enrolled(term, token)).trust;
    const { troubles } = await enrolled(term, token);
    await until(() => troubles.length > 0, "the bound is told");
    expect(troubles[0]).toContain("too many certificates");
    await (await enrolled(term, await term.keys.tokenOf(gatewayRunning()))).trust;
  });

  test("the port is closed when the term has ended", async () => {
    const { term, pod } = await bed();
    await term.end();
    const { troubles } = await enrolled(term, await term.keys.tokenOf(pod));
    await until(() => troubles.length > 0, "nobody answers");
    expect(troubles[0]).toContain("ECONNREFUSED");
  });
});

describe("renewal", () => {
  test("E2: a certificate is renewed when a third of its life is left", async () => {
    const { term, pod } = await bed({ leafMs: 4_000, clock: systemClock });
    const trust = await (await enrolled(term, await term.keys.tokenOf(pod))).trust;
    const endOf = () => new X509Certificate(trust.nats().cert).validToDate.getTime();
    const first = endOf();
    await until(() => endOf() > first, "it is renewed");
    expect(term.news.filter((each) => each.includes("chat-0-3-1")).length).toBeGreaterThanOrEqual(2);
  });

  test("E3: a changed bundle is trusted at once, and brings a new certificate", async () => {
    const { term, pod } = await bed();
    const { trust: coming, folder } = await enrolled(term, await term.keys.tokenOf(pod), { lookMs: 50 });
    const trust = await coming;
    const first = trust.nats().cert;
    const next = bundleOf(await makeAuthority(Date.now()));
    writeFileSync(join(folder, "ca.crt"), `${ca(term)}${next}`);
    await until(() => trust.nats().ca.includes(next.trim()), "the next authority is trusted");
    await until(() => trust.nats().cert !== first, "a new certificate is there");
    expect(trust.nats().ca).toContain(ca(term).trim());
  });
});
