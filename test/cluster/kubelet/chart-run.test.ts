// The chart, run: its pods come up under the rights, the pod security and the trust that it gives them, a model serves, and
// `helm test` asks for a completion and gets it.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { bedEntrypoints, bedValues } from "../../charts/bed-values.ts";
import { CHART } from "../../charts/render.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";

const why = whyNoControlPlane();
const HOME = "muster-system";
const RUN_MS_MAX = 240_000;
const DEPLOYMENTS = ["muster-controller", "muster-gateway", "muster-nats"];
const MODEL = {
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "nano" },
  spec: { model: { source: "builtin://nano-maverick" }, gpu: { count: 2 } },
};

describe.skipIf(why !== undefined)(
  `the chart, run${why ? ` (skipped: ${why})` : ""}`,
  { timeout: RUN_MS_MAX + 60_000 },
  () => {
    let bed: Bed;

    beforeAll(async () => {
      const nodes = [
        { name: "gpu-a", gpus: 2 },
        { name: "gpu-b", gpus: 2 },
      ];
      bed = await Bed.start({ nodes, entrypoints: bedEntrypoints() });
      const labels = { "pod-security.kubernetes.io/enforce": "restricted" };
      await bed.make("/api/v1/namespaces", { apiVersion: "v1", kind: "Namespace", metadata: { name: HOME, labels } });
    }, BED_TIMEOUT_MS);
    afterAll(async () => {
      await bed?.stop();
    });

    /** Repeats a tool until it succeeds; in vain, its last words and the pods are told. */
    async function succeeds(what: string, run: () => Promise<{ code: number; stdout: string; stderr: string }>) {
      let last = "";
      const isDone = async () => {
        const { code, stdout, stderr } = await run();
        last = `${stdout}${stderr}`;
        return code === 0;
      };
      await until(isDone, what, RUN_MS_MAX).catch(async (error) => {
        const { stdout } = await bed.plane.kubectl(["get", "pods,mdep", "-n", HOME, "-o", "wide"]);
        throw new Error(`${error.message}: ${last}\n${stdout}`);
      });
    }

    test("every Deployment is available; a standby controller is ready too", async () => {
      const values = join(bed.plane.dir, "values.json");
      writeFileSync(values, JSON.stringify(bedValues()));
      expect(await bed.plane.helm(["install", "muster", CHART, "-n", HOME, "-f", values])).toMatchObject({ code: 0 });
      for (const name of DEPLOYMENTS)
        await succeeds(`${name} is rolled out`, () =>
          bed.plane.kubectl(["rollout", "status", "-n", HOME, `deployment/${name}`, "--timeout=30s"]),
        );
    });

    test("`helm test` passes without a model, and with one that serves", async () => {
      const ask = () => bed.plane.helm(["test", "muster", "-n", HOME]);
      expect(await ask()).toMatchObject({ code: 0 });
      await bed.make(`/apis/muster.dev/v1alpha1/namespaces/${HOME}/modeldeployments`, MODEL);
      await succeeds("the model serves", () =>
        bed.plane.kubectl(["wait", "-n", HOME, "mdep/nano", "--for=condition=Serving", "--timeout=30s"]),
      );
      expect(await ask()).toMatchObject({ code: 0 });
    });
  },
);
