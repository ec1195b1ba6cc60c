import { describe, expect, onTestFinished, test } from "vitest";
import { KubeError, type KubeObject } from "../../../../controller/kube/api/client.ts";
import { endpointSlices, services } from "../../../../controller/kube/api/resources.ts";
import { leaderEndpointPart } from "../../../../controller/kube/lease/leader-endpoint.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";

const { signal } = new AbortController();
const NS = "muster";
const PORTS = [
  { name: "reports", port: 7441 },
  { name: "certificates", port: 7442 },
];

function bed(options: ConstructorParameters<typeof SimApiServer>[1] = {}) {
  const time = new VirtualClock();
  const server = new SimApiServer(time, options);
  const troubles: string[] = [];
  /** Begins a term; answers how to end it. */
  const lead = (address: string) => {
    const stop = new AbortController();
    const common = { clock: time, random: () => 0.5, namespace: NS, ports: PORTS };
    const part = leaderEndpointPart({ ...common, address, onTrouble: (detail) => troubles.push(detail) });
    const ended = part({ api: server, term: { signal: stop.signal } });
    const end = async () => {
      stop.abort();
      await time.finish(ended);
    };
    onTestFinished(end);
    return end;
  };
  return { time, server, lead, troubles };
}

const slice = (server: SimApiServer): KubeObject | undefined => server.objects(endpointSlices)[0];
const addresses = (server: SimApiServer): unknown => {
  const endpoints = slice(server)?.endpoints;
  return Array.isArray(endpoints) ? endpoints.map((each) => each.addresses) : undefined;
};

describe("where the leader is found", () => {
  test("L1: from its first moment, with its ports; goes with the Service where there is one", async () => {
    const { time, server, lead } = bed();
    const service = { apiVersion: "v1", kind: "Service", metadata: { name: "muster-leader", namespace: NS } };
    const { metadata } = await server.create(services, service, signal);
    lead("10.244.0.7");
    await time.runFor(1);
    expect(slice(server)).toMatchObject({
      addressType: "IPv4",
      endpoints: [{ addresses: ["10.244.0.7"], conditions: { ready: true } }],
      ports: [
        { name: "reports", port: 7441, protocol: "TCP" },
        { name: "certificates", port: 7442, protocol: "TCP" },
      ],
      metadata: {
        labels: { "kubernetes.io/service-name": "muster-leader" },
        ownerReferences: [{ kind: "Service", uid: metadata.uid }],
      },
    });
  });

  test("L1: what others write there is put right, what others add stays, and nothing is written without need", async () => {
    const { time, server, lead } = bed();
    lead("10.244.0.7");
    await time.runFor(1);
    let writes = 0;
    server.onChange(() => {
      writes += 1;
    });
    await time.runFor(600_000);
    expect(writes).toBe(0);
    const patch = (body: unknown) => server.patch(endpointSlices, "muster-leader", NS, body, { type: "merge" }, signal);
    await patch({ metadata: { annotations: { note: "theirs" } } });
    await time.runFor(1_000);
    expect(writes).toBe(1);
    await patch({ endpoints: [{ addresses: ["10.9.9.9"] }] });
    await time.runFor(1_000);
    expect(addresses(server)).toEqual([["10.244.0.7"]]);
    await patch({ metadata: { labels: { "kubernetes.io/service-name": "another" } } });
    await time.runFor(1_000);
    expect(slice(server)?.metadata).toMatchObject({
      labels: { "kubernetes.io/service-name": "muster-leader" },
      annotations: { note: "theirs" },
    });
    await server.delete(endpointSlices, "muster-leader", NS, {}, signal);
    await time.runFor(1_000);
    expect(addresses(server)).toEqual([["10.244.0.7"]]);
  });

  test("L2: it stays at the end of a term, and the next leader writes its own, of whatever kind of address", async () => {
    const { time, server, lead } = bed();
    const end = lead("10.244.0.7");
    await time.runFor(1);
    await end();
    expect(addresses(server)).toEqual([["10.244.0.7"]]);
    const endSecond = lead("10.244.0.8");
    await time.runFor(1_000);
    expect(addresses(server)).toEqual([["10.244.0.8"]]);
    await endSecond();
    lead("fd00::8");
    await time.runFor(5_000);
    expect(slice(server)).toMatchObject({ addressType: "IPv6", endpoints: [{ addresses: ["fd00::8"] }] });
  });

  test("a server that refuses is asked again, and it is said", async () => {
    let isFull = true;
    const { time, server, lead, troubles } = bed({
      admit: () => {
        if (isFull) throw new KubeError(403, "Forbidden", "exceeded quota");
      },
    });
    lead("10.244.0.7");
    await time.runFor(5_000);
    expect(troubles[0]).toContain("exceeded quota");
    isFull = false;
    await time.runFor(20_000);
    expect(addresses(server)).toEqual([["10.244.0.7"]]);
  });
});
