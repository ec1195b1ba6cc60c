// An inspect pod and workers on a claim where every link is mutual TLS, on a cluster whose kubelets bring no certificates: pods
// get theirs by their tokens, the one that inspects is heard, and what it found is planned and served.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";
import { makeClaim } from "./claims.ts";
import { installCrds, startController } from "./controller.ts";
import { SERVE_MS_MAX, serving } from "./serving.ts";

const CORE = "/api/v1/namespaces/default";
const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
/** The controller is a process of the space and no pod: an address that no pod gets. */
const LEADER = "10.244.250.1";
const why = whyNoControlPlane();

describe.skipIf(why !== undefined)(`weights behind certificates${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({ nodes: [{ name: "gpu-a", gpus: 2 }], featureGates: { PodCertificateRequest: false } });
    await installCrds(bed);
    await bed.make(`${CORE}/services`, {
      metadata: { name: "muster-leader" },
      spec: { clusterIP: "None", ports: [7441, 7442].map((port) => ({ name: `p${port}`, port })) },
    });
    const flags = { listen: `${LEADER}:7441`, enrol: `${LEADER}:7442`, advertise: "muster-leader.default.svc" };
    startController(bed, { ...flags, tls: true }, { env: { MUSTER_POD_IP: LEADER } });
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  test(
    "a pod looks at the claim with a certificate, and the deployment serves",
    async () => {
      await makeClaim(bed, "weights", ["gpu-a"]);
      await bed.make(`${OURS}/modeldeployments`, {
        apiVersion: "muster.dev/v1alpha1",
        kind: "ModelDeployment",
        metadata: { name: "sealed" },
        spec: { model: { source: "pvc://weights/models/nano" }, gpu: { count: 2 }, slo: { concurrency: 8 } },
      });
      const group = await serving(bed, "sealed");
      expect(group.status).toMatchObject({ ready: "2/2", restarts: 0 });
    },
    SERVE_MS_MAX + 60_000,
  );
});
