// Trust on a real control plane: tokens of real pods, checked against the real keys of the API server, become certificates;
// golden tokens come over mutual TLS; whoever has no certificate, or a wrong one, is refused on every port.
import { X509Certificate } from "node:crypto";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { connect } from "node:tls";
import { type ChannelCredentials, credentials, Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { z } from "zod";
import { bundleOf, LEAF_MS, makeAuthority, makeLeaf } from "../../../controller/kube/trust/authority.ts";
import { enrol } from "../../../proto/enrol.ts";
import { InspectedPart, ReportsClient } from "../../../proto/gen/muster/v1/report.ts";
import { CertificatesClient } from "../../../proto/gen/muster/v1/trust.ts";
import { WorkerClient } from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { MutualTrust, type Trust } from "../../../proto/trust.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { installCrds, startController } from "./controller.ts";
import { expectGolden, nanoDeployment, SERVE_MS_MAX, serving } from "./serving.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const CORE = "/api/v1/namespaces/default";
/** The controller is a process of the space and no pod: an address that no pod gets. */
const LEADER = "10.244.250.1";
const STEP_MS_MAX = SERVE_MS_MAX + 60_000;
const WORKER_PORT = 7440;
/** The controller looks each minute. */
const KEEP_MS_MAX = 120_000;
const why = whyNoControlPlane();

const DEPLOYMENT = nanoDeployment({ gpu: { count: 2, topology: { nodes: 2 } }, parallelism: { tp: 2, ep: 2 } });

const MESSAGE = InspectedPart.fromPartial({ namespace: "default", inspection: "forged" });

const Data = z.looseObject({ data: z.record(z.string(), z.string()) });
const Slice = z.looseObject({
  endpoints: z.array(z.looseObject({ addresses: z.array(z.string()) })),
  ports: z.array(z.looseObject({ name: z.string(), port: z.number() })),
});
const TokenAnswer = z.looseObject({ status: z.looseObject({ token: z.string() }) });
const PodUid = z.looseObject({ metadata: z.looseObject({ uid: z.string() }) });

const Requests = z.looseObject({
  items: z.array(
    z.looseObject({
      spec: z.looseObject({ podName: z.string(), signerName: z.string() }),
      status: z.looseObject({ certificateChain: z.string() }),
    }),
  ),
});

type Outcome = { code: number; details: string } | "ok";

describe.skipIf(why !== undefined)(`trust on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;
  let workers: string[] = [];

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "gpu-a", gpus: 1 },
        { name: "gpu-b", gpus: 1 },
      ],
    });
    await installCrds(bed);
    await bed.make(`${CORE}/services`, {
      metadata: { name: "muster-leader" },
      spec: { clusterIP: "None", ports: [7441, 7442].map((port) => ({ name: `p${port}`, port })) },
    });
    await bed.make(`${CORE}/serviceaccounts`, { metadata: { name: "muster-gateway" } });
    const flags = { listen: `${LEADER}:7441`, enrol: `${LEADER}:7442`, advertise: "muster-leader.default.svc" };
    startController(bed, { ...flags, tls: true }, { env: { MUSTER_POD_IP: LEADER } });
    for (const [name, serviceAccountName] of [
      ["muster-gateway-1", "muster-gateway"],
      ["stranger", "default"],
    ])
      await bed.make(POD_PATH, {
        metadata: { name, labels: { "app.kubernetes.io/name": name === "stranger" ? name : "muster" } },
        spec: { serviceAccountName, containers: [{ name: "main", image: "none", command: ["sleep", "100000"] }] },
      });
    await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  const find = (path: string) => bed.plane.api.find(path);
  const secret = async (name: string) => {
    const { data } = Data.parse(await find(`${CORE}/secrets/${name}`));
    return Object.fromEntries(
      Object.entries(data).map(([key, value]) => [key, Buffer.from(value, "base64").toString()]),
    );
  };
  const bundle = async () => Data.parse(await find(`${CORE}/configmaps/muster-ca`)).data["ca.crt"] ?? "";

  async function tokenOf(pod: string, account: string, audience = "muster"): Promise<string> {
    const { uid } = PodUid.parse(await find(`${POD_PATH}/${pod}`)).metadata;
    const boundObjectRef = { kind: "Pod", apiVersion: "v1", name: pod, uid };
    const body = {
      apiVersion: "authentication.k8s.io/v1",
      kind: "TokenRequest",
      spec: { audiences: [audience], expirationSeconds: 600, boundObjectRef },
    };
    const answer = await bed.plane.api.ask({ method: "POST", path: `${CORE}/serviceaccounts/${account}/token`, body });
    return TokenAnswer.parse(answer).status.token;
  }

  /** 127.0.0.1:port that leads into the space, until the test ends. */
  async function reach(address: string, port: number): Promise<string> {
    const forward = await bed.plane.space.forward(address, port);
    onTestFinished(() => forward.close());
    return `127.0.0.1:${forward.port}`;
  }

  /** As a pod would: folder, token, address. */
  async function enrolAs(token: string, troubles: string[] = []): Promise<Trust> {
    const stop = new AbortController();
    onTestFinished(() => stop.abort());
    const folder = join(bed.plane.dir, `identity-${troubles.length}-${token.slice(-12)}`);
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, "token"), token);
    writeFileSync(join(folder, "ca.crt"), await bundle());
    const address = await reach(LEADER, 7442);
    const onTrouble = (detail: string) => {
      troubles.push(detail);
      stop.abort();
    };
    return await enrol({ folder, address, onTrouble }, stop.signal);
  }

  /** SHA-256 of the certificate that a server shows. */
  async function shownBy(address: string): Promise<string> {
    const local = await reach(address, WORKER_PORT);
    const { promise, resolve, reject } = Promise.withResolvers<string>();
    const socket = connect({ host: "127.0.0.1", port: Number(local.split(":")[1]), rejectUnauthorized: false }, () =>
      resolve(socket.getPeerCertificate().fingerprint256),
    );
    socket.on("error", reject); // of no weight once it has been shown
    try {
      return await promise;
    } finally {
      socket.destroy();
    }
  }

  const gatewayTrust = async () => enrolAs(await tokenOf("muster-gateway-1", "muster-gateway"));

  test(
    "2 workers get certificates through their kubelets and serve the golden tokens over mutual TLS",
    async () => {
      const group = await serving(bed, "nano");
      workers = await Promise.all(
        group.status.placement.map(async ({ pod }) => (await bed.ready(pod)).status.podIP ?? ""),
      );
      expect(workers.length).toBe(2);
      const trust = await gatewayTrust();
      const peer = { role: "worker", namespace: "default", group: group.metadata.name } as const;
      await expectGolden(bed, group, trust.channel(peer));
      const requests = await find("/apis/certificates.k8s.io/v1/namespaces/default/podcertificaterequests");
      const issued = Requests.parse(requests).items;
      expect(issued.map(({ spec }) => spec.podName).toSorted()).toEqual(
        group.status.placement.map(({ pod }) => pod).toSorted(),
      );
      for (const {
        spec,
        status: { certificateChain },
      } of issued) {
        expect(spec.signerName).toBe("muster.dev/default");
        const address = (await bed.ready(spec.podName)).status.podIP ?? "";
        expect(await shownBy(address)).toBe(new X509Certificate(certificateChain).fingerprint256);
      }
    },
    STEP_MS_MAX,
  );

  test("what the controller makes: authority, bundle, the broker's part, where it is found", async () => {
    const [authority, broker] = [await secret("muster-ca"), await secret("muster-nats")];
    expect(authority["tls.key"]).toContain("PRIVATE KEY");
    expect(await bundle()).toBe(authority["ca.crt"]);
    const leaf = new X509Certificate(broker["tls.crt"] ?? "");
    expect(leaf.verify(new X509Certificate(authority["tls.crt"] ?? "").publicKey)).toBe(true);
    expect(leaf.checkHost("muster-nats.default.svc")).toBe("muster-nats.default.svc");
    expect(broker.token?.length).toBeGreaterThan(30);
    const slice = Slice.parse(await find("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/muster-leader"));
    expect(slice.endpoints.map(({ addresses }) => addresses)).toEqual([[LEADER]]);
    expect(slice.ports.map(({ name, port }) => `${name} ${port}`).toSorted()).toEqual([
      "certificates 7442",
      "reports 7441",
    ]);
  });

  test(
    "what others change of it is put right",
    async () => {
      const before = await bundle();
      const slicePath = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/muster-leader";
      await bed.plane.kubectl(["patch", "configmap", "muster-ca", "-p", '{"data":{"ca.crt":"not ours"}}']);
      expect(await bundle()).toBe("not ours");
      await bed.remove(slicePath);
      await until(async () => (await find(slicePath)) !== undefined, "the leader is found again");
      await until(async () => (await bundle()) === before, "the bundle is back", KEEP_MS_MAX);
    },
    2 * KEEP_MS_MAX,
  );

  test("a client without, or with a wrong certificate is refused on every port", async () => {
    const ours = await bundle();
    const foreign = await makeAuthority(Date.now());
    const identity = { role: "controller", namespace: "default", name: "forged", podUid: "forged" } as const;
    const notAfterMs = Date.now() + LEAF_MS;
    const forged = await makeLeaf(foreign, { identity, dns: [], ips: [], notAfterMs }, Date.now());
    const blind = { checkServerIdentity: () => undefined };
    const bad: [string, ChannelCredentials][] = [
      ["in clear", credentials.createInsecure()],
      ["without a certificate", credentials.createSsl(Buffer.from(ours), null, null, blind)],
      [
        "of a foreign authority",
        credentials.createSsl(Buffer.from(ours), Buffer.from(forged.key), Buffer.from(forged.cert), blind),
      ],
    ];
    for (const [what, own] of bad) {
      for (const ip of workers)
        expect(await describeOf(await reach(ip, WORKER_PORT), own), `${what} at a worker`).toMatchObject({
          code: status.UNAVAILABLE,
        });
      expect(await inspectedOf(await reach(LEADER, 7441), own), `${what} at the reports`).toMatchObject({
        code: status.UNAVAILABLE,
      });
    }
    const enrolment = await reach(LEADER, 7442);
    expect(await issueOf(enrolment, credentials.createInsecure(), "x")).toMatchObject({ code: status.UNAVAILABLE });
    const blindly = new MutualTrust({ ...forged, ca: bundleOf(foreign) });
    expect(await issueOf(enrolment, blindly.channel({ role: "controller" }), "x")).toMatchObject({
      code: status.UNAVAILABLE,
    });
    // A right certificate where another is asked for.
    const gateway = await gatewayTrust();
    expect(
      await describeOf(await reach(workers[0] ?? "", WORKER_PORT), gateway.channel({ role: "controller" })),
    ).toMatchObject({
      details: expect.stringContaining("refused: it is worker"),
    });
    const asGateway = await inspectedOf(await reach(LEADER, 7441), gateway.channel({ role: "controller" }));
    expect(asGateway).toMatchObject({
      code: status.PERMISSION_DENIED,
      details: expect.stringContaining("not for gateway"),
    });
  });

  test("a token of another pod, for another audience, or of a pod that has gone is refused with the reason", async () => {
    const refusalOf = async (token: string): Promise<string> => {
      const troubles: string[] = [];
      await expect(enrolAs(token, troubles)).rejects.toThrow();
      return troubles.join("; ");
    };
    await bed.ready("stranger");
    const own = await tokenOf("stranger", "default");
    expect(await refusalOf(own)).toContain("neither a worker nor a gateway");
    expect(await refusalOf(await tokenOf("muster-gateway-1", "muster-gateway", "elsewhere"))).toContain('"aud"');
    expect(await refusalOf(`${own.slice(0, -6)}AAAAAA`)).toContain("not valid");
    await bed.end("stranger");
    expect(await refusalOf(own)).toMatch(/is not there|has ended/);
  });

  const bound = () => ({ deadline: Date.now() + 10_000 });
  const outcomeOf = (error: ServiceError | null): Outcome =>
    error === null ? "ok" : { code: error.code, details: error.details };

  function describeOf(address: string, own: ChannelCredentials): Promise<Outcome> {
    const client = new WorkerClient(address, own, channelOptions);
    onTestFinished(() => client.close());
    return new Promise((done) =>
      client.describe({ incarnation: 1n }, new Metadata(), bound(), (error: ServiceError | null) =>
        done(outcomeOf(error)),
      ),
    );
  }

  function inspectedOf(address: string, own: ChannelCredentials): Promise<Outcome> {
    const client = new ReportsClient(address, own, channelOptions);
    onTestFinished(() => client.close());
    return new Promise((done) => {
      const call = client.inspected(new Metadata(), bound(), (error: ServiceError | null) => done(outcomeOf(error)));
      call.on("error", () => {});
      call.write(MESSAGE);
      call.end();
    });
  }

  function issueOf(address: string, own: ChannelCredentials, token: string): Promise<Outcome> {
    const client = new CertificatesClient(address, own, channelOptions);
    onTestFinished(() => client.close());
    const request = { token, requestDer: Buffer.from("x") };
    return new Promise((done) =>
      client.issue(request, new Metadata(), bound(), (error: ServiceError | null) => done(outcomeOf(error))),
    );
  }
});
