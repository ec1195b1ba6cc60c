// The trust of controllers against a simulated API server: who makes the authority, and what is kept while one leads.
import { describe, expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { textsOf } from "../../../../controller/kube/api/fields.ts";
import { configMaps, secrets } from "../../../../controller/kube/api/resources.ts";
import { AUTHORITY_MS, OVERLAP_MS, RENEW_BEFORE_MS } from "../../../../controller/kube/trust/authority.ts";
import { keepAuthority, keepBroker } from "../../../../controller/kube/trust/secrets.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { calm, FaultyApi } from "../../../sim/faults.ts";
import { randomOf } from "../../../sim/random.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { until } from "../../../until.ts";
import { groupAt, RELEASE, signal, TrustTerm } from "./term.ts";

const find = (server: SimApiServer, name: string): KubeObject | undefined =>
  server.objects(secrets).find(({ metadata }) => metadata.name === name);
const decoded = (object: KubeObject | undefined): Record<string, string> =>
  Object.fromEntries(
    Object.entries(textsOf(object?.data)).map(([key, value]) => [key, Buffer.from(value, "base64").toString()]),
  );
const bundles = (server: SimApiServer): Record<string, string> =>
  Object.fromEntries(
    server.objects(configMaps).map(({ metadata, data }) => [metadata.namespace, textsOf(data)["ca.crt"] ?? ""]),
  );

describe("the authority's Secret", () => {
  test("S1: of many controllers that begin at once all have the same authority and token", async () => {
    const time = new VirtualClock();
    const server = new SimApiServer(time);
    const at = { api: server, namespace: RELEASE, nowMs: () => time.nowMs() };
    const opened = await Promise.all(
      Array.from({ length: 12 }, async () => {
        const authority = await keepAuthority(at, undefined, signal);
        return { authority, broker: await keepBroker(at, authority, undefined, signal) };
      }),
    );
    expect(new Set(opened.map(({ authority }) => authority.signer.cert)).size).toBe(1);
    expect(new Set(opened.map(({ broker }) => broker.token)).size).toBe(1);
    expect(server.objects(secrets).length).toBe(2);
  });

  test("S1: also where answers are lost and the server has its moods", async () => {
    for (let seed = 1; seed <= 20; seed++) {
      const time = new VirtualClock();
      const server = new SimApiServer(time);
      const plan = { ...calm, untilMs: time.nowMs() + 60_000, loseReply: 0.3, unreachable: 0.2 };
      const opened = await Promise.all(
        Array.from({ length: 4 }, async (_, index) => {
          const api = new FaultyApi(server, { time, random: randomOf(seed * 100 + index), plan });
          const at = { api, namespace: RELEASE, nowMs: () => time.nowMs() };
          return await keepAuthority(at, undefined, signal).catch(() => undefined); // gives up after a few, as a process would
        }),
      );
      const [stored] = server.objects(secrets);
      for (const authority of opened.filter((each) => each !== undefined))
        expect(authority.signer.cert, `seed ${seed}`).toBe(decoded(stored)["tls.crt"]);
    }
  });

  test("S2: what cannot be read is said by its field, and not written over", async () => {
    const time = new VirtualClock();
    const server = new SimApiServer(time);
    const data = { "tls.crt": Buffer.from("somebody's").toString("base64") };
    const broken = { apiVersion: "v1", kind: "Secret", metadata: { name: "muster-ca", namespace: RELEASE }, data };
    await server.create(secrets, broken, signal);
    await expect(TrustTerm.begin({ server, time })).rejects.toThrow("Secret muster/muster-ca: tls.crt");
    expect(find(server, "muster-ca")?.data).toEqual(data);
  });
});

describe("while one leads", () => {
  test("everything is there before the term begins", async () => {
    const { server, opened } = await TrustTerm.begin();
    const authority = decoded(find(server, "muster-ca"));
    const broker = decoded(find(server, "muster-nats"));
    expect(bundles(server)).toEqual({ [RELEASE]: authority["ca.crt"] });
    expect(broker).toMatchObject({ "ca.crt": authority["ca.crt"], token: opened.natsToken });
    expect(opened.trust.nats()?.ca).toBe(authority["ca.crt"]);
  });

  test("B1: each namespace with an owner has the bundle; what is changed or deleted comes back", async () => {
    const term = await TrustTerm.begin();
    const { server, stores } = term;
    const bundle = decoded(find(server, "muster-ca"))["ca.crt"] ?? "";
    stores.groups.put(groupAt("chat-0", 1, "team-a"));
    const pool = {
      apiVersion: "muster.dev/v1alpha1",
      kind: "DraftPool",
      metadata: { name: "d", namespace: "team-b", uid: "p" },
    };
    stores.pools.put(pool);
    await term.till(() => Object.keys(bundles(server)).length === 3, "both have it", 100);
    expect(bundles(server)).toEqual({ [RELEASE]: bundle, "team-a": bundle, "team-b": bundle });
    const edit = { data: { "ca.crt": "an attacker's" } };
    await server.patch(configMaps, "muster-ca", "team-a", edit, { type: "merge" }, signal);
    await server.delete(configMaps, "muster-ca", "team-b", {}, signal);
    await term.till(
      () => bundles(server)["team-a"] === bundle && bundles(server)["team-b"] === bundle,
      "they are back",
    );
  });

  test("B2: a namespace that refuses is said, and holds up no other", async () => {
    const time = new VirtualClock(Date.now());
    const { KubeError } = await import("../../../../controller/kube/api/client.ts");
    const server = new SimApiServer(time, {
      admit: (object) => {
        if (object.kind === "ConfigMap" && object.metadata.namespace === "a-full-one")
          throw new KubeError(403, "Forbidden", "exceeded quota");
      },
    });
    const term = await TrustTerm.begin({ server, time });
    term.stores.groups.put(groupAt("chat-0", 1, "a-full-one"));
    term.stores.groups.put(groupAt("chat-1", 1, "z-last"));
    await term.till(() => "z-last" in bundles(server), "the last has it", 100);
    await until(() => term.troubles.length > 0, "it is said");
    expect(term.troubles[0]).toContain("the bundle cannot be kept in a-full-one: exceeded quota");
  });

  test("the authority and the broker's Secret are put back when they are deleted, as they were", async () => {
    const term = await TrustTerm.begin();
    const { server } = term;
    const [authority, broker] = [decoded(find(server, "muster-ca")), decoded(find(server, "muster-nats"))];
    for (const name of ["muster-ca", "muster-nats"]) await server.delete(secrets, name, RELEASE, {}, signal);
    await term.till(() => server.objects(secrets).length === 2, "both are back");
    expect(decoded(find(server, "muster-ca"))).toEqual(authority);
    expect(decoded(find(server, "muster-nats")).token).toBe(broker.token);
  });

  test("A2: near its end the next authority is announced, then signs; broker, bundles and own certificate follow", async () => {
    const time = new VirtualClock(Date.now() - (AUTHORITY_MS - RENEW_BEFORE_MS) - 60_000);
    const term = await TrustTerm.begin({ time });
    const { server, opened } = term;
    const first = decoded(find(server, "muster-ca"))["tls.crt"];
    // To just before the turn, without the passes of nine years.
    await term.end();
    await time.runUntil(Date.now());
    const later = await TrustTerm.begin({ server, time });
    await later.till(() => "next.crt" in decoded(find(server, "muster-ca")), "the next is announced", 10_000);
    const announced = decoded(find(server, "muster-ca"));
    expect(announced["tls.crt"]).toBe(first);
    await later.till(() => bundles(server)[RELEASE] === announced["ca.crt"], "the bundle has it");
    expect(decoded(find(server, "muster-nats"))["ca.crt"]).toBe(announced["ca.crt"]);
    await later.end();
    await time.runFor(OVERLAP_MS + 600_000);
    const last = await TrustTerm.begin({ server, time });
    const signing = decoded(find(server, "muster-ca"));
    expect(signing["tls.crt"]).toBe(announced["next.crt"]);
    expect(signing["ca.crt"]).toContain(first?.trim());
    expect(last.opened.trust.nats()?.ca).toBe(signing["ca.crt"]);
    expect(decoded(find(server, "muster-nats"))["ca.crt"]).toBe(signing["ca.crt"]);
    expect(last.opened.natsToken).toBe(opened.natsToken);
  });

  test("its own certificate is renewed in time", async () => {
    const begunMs = Date.now();
    const term = await TrustTerm.begin({ leafMs: 3_600_000 });
    const first = term.opened.trust.nats()?.cert;
    await term.till(() => term.opened.trust.nats()?.cert !== first, "it is renewed", 60_000);
    const minutes = (term.time.nowMs() - begunMs) / 60_000;
    expect(minutes).toBeGreaterThan(35); // two thirds of an hour, and of the five minutes that are dated back
    expect(minutes).toBeLessThan(45);
  });
});
