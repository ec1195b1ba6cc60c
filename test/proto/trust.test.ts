import { credentials, status } from "@grpc/grpc-js";
import { describe, expect, test } from "vitest";
import { bundleOf } from "../../controller/kube/trust/authority.ts";
import { identityIn, MutualTrust, noTrust, uriOf } from "../../proto/trust.ts";
import { until } from "../until.ts";
import {
  anonymous,
  ask,
  authorityNow,
  clientOf,
  controller,
  gateway,
  materialOf,
  outcome,
  serve,
  trustOf,
  workerOf,
} from "./mutual-bed.ts";

const leader = workerOf("nano-d-0", "w-1");

describe("who a certificate names", () => {
  test("U1: what is written is read back, beside other names", () => {
    for (const identity of [
      controller,
      gateway,
      leader,
      { ...leader, role: "nats" as const },
      { ...leader, role: "inspect" as const },
    ])
      expect(identityIn(`DNS:a.b, URI:${uriOf(identity)}, IP Address:10.0.0.1`)).toEqual(identity);
  });

  test.each([
    ["nothing", undefined],
    ["names alone", "DNS:muster, IP Address:10.0.0.1"],
    ["two of ours", `URI:${uriOf(leader)}, URI:${uriOf(gateway)}`],
    ["an unknown role", "URI:muster://admin/a/b/c"],
    ["a role of every object", "URI:muster://constructor/a/b/c"],
    ["too few parts", "URI:muster://worker/a/b"],
    ["too many parts", "URI:muster://worker/a/b/c/d"],
    ["an empty part", "URI:muster://worker//b/c"],
    ["a quoted name that poses as ours", `DNS:"x, URI:muster://worker/a/b/c"`],
    ["another scheme", "URI:spiffe://worker/a/b/c"],
  ])("U1: %s names nobody", (_, names) => expect(identityIn(names)).toBeUndefined());

  test("U1: a part that would not be read back is not written", () => {
    for (const part of ["", "a/b", "a b", "a,b", "-a"]) expect(() => uriOf({ ...leader, name: part })).toThrow("name");
  });

  test("key and certificate of two do not make one", async () => {
    const authority = await authorityNow();
    const [one, other] = [await materialOf(authority, leader), await materialOf(authority, leader)];
    expect(() => new MutualTrust({ ...one, key: other.key })).toThrow("not that of the certificate");
    const trust = new MutualTrust(one);
    expect(() => trust.update({ ...other, key: one.key })).toThrow();
    expect(trust.nats()).toMatchObject({ cert: one.cert, key: one.key });
  });
});

describe("a worker's server", () => {
  const takes = ["controller", "gateway", "worker"] as const;

  async function bed() {
    const authority = await authorityNow();
    let calls = 0;
    const address = await serve((await trustOf(authority, leader)).server(takes), () => {
      calls += 1;
    });
    return { authority, address, calls: () => calls };
  }

  test("answers controller, gateway and its own group", async () => {
    const { authority, address } = await bed();
    for (const identity of [controller, gateway, workerOf("nano-d-0", "w-2")])
      expect(await ask(address, (await trustOf(authority, identity)).channel({ role: "worker" }))).toBe("ok");
  });

  test("refuses clear text, and TLS without a certificate", async () => {
    const { authority, address, calls } = await bed();
    expect(await ask(address, noTrust.channel({ role: "worker" }))).toMatchObject({ code: status.UNAVAILABLE });
    expect(await ask(address, anonymous(bundleOf(authority)))).toMatchObject({ code: status.UNAVAILABLE });
    expect(calls()).toBe(0);
  });

  test("refuses a certificate of a foreign authority, and is refused by who trusts another", async () => {
    const { authority, address, calls } = await bed();
    const foreign = await authorityNow();
    const forged = await materialOf(foreign, controller);
    const stranger = new MutualTrust({ ...forged, ca: bundleOf(authority) });
    expect(await ask(address, stranger.channel({ role: "worker" }))).toMatchObject({ code: status.UNAVAILABLE });
    expect(await ask(address, new MutualTrust(forged).channel({ role: "worker" }))).toMatchObject({
      code: status.UNAVAILABLE,
    });
    expect(calls()).toBe(0);
  });

  test("refuses a certificate that has expired", async () => {
    const { authority, address, calls } = await bed();
    const old = new MutualTrust(await materialOf(authority, controller, 25 * 3_600_000));
    expect(await ask(address, old.channel({ role: "worker" }))).toMatchObject({ code: status.UNAVAILABLE });
    expect(calls()).toBe(0);
  });

  test("U2: refuses workers of another group or namespace, and roles that it does not take", async () => {
    const { authority, address, calls } = await bed();
    const strangers = [
      workerOf("nano-d-1", "w-3"),
      workerOf("nano-d-0", "w-4", "others"),
      { ...gateway, role: "inspect" as const },
    ];
    for (const identity of strangers) {
      const { cert, key, ca } = await materialOf(authority, identity);
      // As a forger would: with no check of its own.
      const own = credentials.createSsl(Buffer.from(ca), Buffer.from(key), Buffer.from(cert), {
        checkServerIdentity: () => undefined,
      });
      expect(await ask(address, own)).toMatchObject({ code: status.UNAUTHENTICATED });
    }
    expect(calls()).toBe(0);
  });
});

describe("a channel", () => {
  test("is opened to the role, pod and group that it asks for, and to no other", async () => {
    const authority = await authorityNow();
    const takes = ["controller"] as const;
    const address = await serve((await trustOf(authority, leader)).server(takes));
    const trust = await trustOf(authority, controller);
    expect(
      await ask(address, trust.channel({ role: "worker", podUid: "w-1", namespace: "models", group: "nano-d-0" })),
    ).toBe("ok");
    const wrong = [
      { role: "controller" } as const,
      { role: "gateway" } as const,
      { role: "worker", podUid: "w-2" } as const,
      { role: "worker", group: "nano-d-1" } as const,
      { role: "worker", namespace: "others", group: "nano-d-0" } as const,
    ];
    for (const peer of wrong) {
      const refused = await ask(address, trust.channel(peer));
      expect(refused).toMatchObject({
        code: status.UNAVAILABLE,
        details: expect.stringContaining("refused: it is worker"),
      });
    }
  });

  test("a gateway's certificate does where no controller is", async () => {
    const authority = await authorityNow();
    const address = await serve((await trustOf(authority, gateway)).server(["worker"]));
    const trust = await trustOf(authority, leader);
    expect(await ask(address, trust.channel({ role: "controller" }))).toMatchObject({
      details: expect.stringContaining("not a controller"),
    });
    expect(await ask(address, trust.channel({ role: "gateway" }))).toBe("ok");
  });

  test("is refused by a server in clear", async () => {
    const address = await serve(noTrust.server(["controller"]));
    const trust = await trustOf(await authorityNow(), controller);
    expect(await ask(address, trust.channel({ role: "worker" }))).toMatchObject({ code: status.UNAVAILABLE });
  });
});

describe("U3: renewal without a restart", () => {
  test("new connections of a live server and a live trust use the new certificates; old ones go on", async () => {
    const former = await authorityNow();
    const next = await authorityNow();
    const both = bundleOf({ ...next, former: [former.signer.cert] });
    const own = await trustOf(former, leader);
    const trust = await trustOf(former, controller);
    const address = await serve(own.server(["controller"]));
    const before = clientOf(address, trust.channel({ role: "worker" }));
    expect(await outcome(before)).toBe("ok");
    const onlyNext = new MutualTrust(await materialOf(next, controller));
    expect(await ask(address, onlyNext.channel({ role: "worker" }))).toMatchObject({ code: status.UNAVAILABLE });

    own.update({ ...(await materialOf(next, leader)), ca: both });
    expect(await outcome(before)).toBe("ok"); // the connection that was there
    expect(await ask(address, onlyNext.channel({ role: "worker" }))).toBe("ok");
    // The former bundle does not know the server's new certificate; the channel that lives learns of the bundle.
    const live = clientOf(address, trust.channel({ role: "worker" }));
    expect(await outcome(live)).toMatchObject({ code: status.UNAVAILABLE });
    trust.update({ ...trust.nats(), ca: both });
    await until(async () => (await outcome(live)) === "ok", "the channel connects with the new bundle");
    own.update({ ...own.nats(), ca: bundleOf(next) });
    expect(await ask(address, trust.channel({ role: "worker" }))).toMatchObject({ code: status.UNAVAILABLE });
  });

  test("a server for those without a certificate proves itself, and renews too", async () => {
    const former = await authorityNow();
    const next = await authorityNow();
    const own = await trustOf(former, controller);
    const address = await serve(own.openServer());
    expect(await ask(address, anonymous(bundleOf(former)))).toBe("ok");
    own.update(await materialOf(next, controller));
    expect(await ask(address, anonymous(bundleOf(former)))).toMatchObject({ code: status.UNAVAILABLE });
    expect(await ask(address, anonymous(bundleOf(next)))).toBe("ok");
  });
});
