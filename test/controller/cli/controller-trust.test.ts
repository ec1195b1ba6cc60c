import { afterEach, describe, expect, test } from "vitest";
import { openTrusted, type TrustFlags } from "../../../controller/cli/controller-trust.ts";
import { secrets } from "../../../controller/kube/api/resources.ts";
import { noTrust } from "../../../proto/trust.ts";
import { SimApiServer } from "../../sim/api-server.ts";
import { VirtualClock } from "../../sim/virtual-clock.ts";
import { TEMPLATE } from "../kube/groups/groups.ts";

const { signal } = new AbortController();
const FLAGS = {
  listen: "0.0.0.0:7441",
  enrol: "0.0.0.0:7442",
  advertise: "muster-leader.muster.svc",
  natsUrl: "tls://n:4222",
};
const template = { ...TEMPLATE, caConfigMap: undefined };

function open(flags: TrustFlags, server = new SimApiServer(new VirtualClock())) {
  const readDocument = () => Promise.reject(new Error("nobody asks for a certificate here"));
  const quiet = { onNews: () => {}, onTrouble: () => {} };
  return openTrusted({ flags, api: server, readDocument, template, namespace: "muster", ...quiet }, signal);
}

afterEach(() => {
  for (const name of ["MUSTER_POD_IP", "MUSTER_NATS_TOKEN"]) delete process.env[name];
});

describe("muster controller --tls", () => {
  test("tells worker pods where certificates and bundle are, and drafts who they are", async () => {
    const server = new SimApiServer(new VirtualClock());
    const { template: told, broker, trust, parts } = await open({ ...FLAGS, tls: true }, server);
    expect(told).toMatchObject({ enrol: "muster-leader.muster.svc:7442", caConfigMap: "muster-ca" });
    expect(broker).toEqual({ url: "tls://n:4222", user: "muster", token: expect.stringMatching(/^[\w-]{40,}$/) });
    expect(trust.nats()?.cert).toContain("BEGIN CERTIFICATE");
    expect(parts.length).toBe(1); // no pod: nobody is led to it
    expect(server.objects(secrets).length).toBe(2);
  });

  test("in a pod is found by its Service; the token of an external broker is as it was given", async () => {
    process.env.MUSTER_POD_IP = "10.244.0.9";
    process.env.MUSTER_NATS_TOKEN = "given";
    const { broker, parts } = await open({ ...FLAGS, tls: true });
    expect(broker).toEqual({ url: "tls://n:4222", token: "given" });
    expect(parts.length).toBe(2);
  });

  test("left out, all is in clear and nothing is made", async () => {
    const server = new SimApiServer(new VirtualClock());
    const { trust, template: told, broker } = await open(FLAGS, server);
    expect([trust, told]).toEqual([noTrust, template]);
    expect(broker).toEqual({ url: "tls://n:4222", user: "", token: "" });
    expect(server.objects(secrets)).toEqual([]);
  });

  test.each<[TrustFlags, string]>([
    [{ tls: true }, "--tls: --enrol and --advertise"],
    [{ tls: true, enrol: FLAGS.enrol }, "--tls: --enrol and --advertise"],
    [{ ...FLAGS, enrol: "7442", tls: true }, "--enrol"],
    [{ ...FLAGS, enrol: "0.0.0.0:0", tls: true }, "--enrol"],
  ])("%j is refused by the name of the flag", async (flags, why) => {
    await expect(open(flags)).rejects.toThrow(why);
  });

  test("a pod address that is none is refused by its name", async () => {
    process.env.MUSTER_POD_IP = "me";
    await expect(open(FLAGS)).rejects.toThrow("MUSTER_POD_IP");
  });
});
