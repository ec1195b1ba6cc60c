// A deployment that sleeps, on a real control plane: the first request is held and hears why it waits; what the gateway reports
// wakes the autoscaler, and the request is answered. Nothing is scripted: controller, gateway and worker are processes.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { chunksOf, openSse } from "../../controller/gateway/sse-client.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { controllerSaid, installCrds, startController, startGateway } from "./controller.ts";
import { Deployment, goldenPrompts, groupsOf, nanoDeployment, SERVE_MS_MAX } from "./serving.ts";

const NANO = "/apis/muster.dev/v1alpha1/namespaces/default/modeldeployments";
const HTTP_PORT = 8080;
const REPORTS = "127.0.0.1:7441";
/** How long a sleeper is watched sleeping: the controller looks at its load several times in it. */
const ASLEEP_LOOKS = 20;
const why = whyNoControlPlane();

const DEPLOYMENT = nanoDeployment({ autoscale: { min: 0, max: 1, targets: { queue: 4 } }, gpu: { count: 1 } });

describe.skipIf(why !== undefined)(`a sleeper on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;
  let url = "";

  beforeAll(async () => {
    bed = await Bed.start({ nodes: [{ name: "gpu-a", gpus: 1 }] });
    await installCrds(bed);
    await bed.make(NANO, DEPLOYMENT);
    // As ten idle minutes leave it: nothing else says that it sleeps.
    const stored = await bed.plane.api.find(`${NANO}/nano`);
    const body = { ...Object(stored), status: { targetReplicas: 0 } };
    await bed.plane.api.ask({ method: "PUT", path: `${NANO}/nano/status`, body });
    startController(bed, { listen: REPORTS, advertise: "127.0.0.1" });
    startGateway(bed, `127.0.0.1:${HTTP_PORT}`, ["--reports", REPORTS]);
    url = `http://127.0.0.1:${(await bed.plane.space.forward("127.0.0.1", HTTP_PORT)).port}`;
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  const deployment = async () => Deployment.parse(await bed.plane.api.find(`${NANO}/nano`)).status;

  test(
    "nobody asks: it sleeps; the first request is held with a reason, wakes it, and gets the golden text",
    async () => {
      const isPlanned = async () => (await deployment()).conditions.some(({ type }) => type === "Planned");
      await until(isPlanned, "it is planned", SERVE_MS_MAX).catch((error) => {
        throw new Error(`${error.message}\n${controllerSaid(bed)}`);
      });
      const isReady = async () => (await fetch(`${url}/readyz`).catch(() => undefined))?.status === 200;
      await until(isReady, "the gateway is ready");
      for (let look = 0; look < ASLEEP_LOOKS; look++) {
        expect(await groupsOf(bed, "nano")).toEqual([]);
        expect((await bed.plane.api.list(POD_PATH)).items).toEqual([]);
      }
      const [golden] = goldenPrompts();
      if (golden === undefined) throw new Error("there is no golden prompt");
      const ask = { model: "nano", temperature: 0, ignore_eos: true, stream: true };
      const request = { ...ask, prompt: golden.prompt, max_tokens: golden.greedy.length };
      const got = await chunksOf(await openSse(url, "/v1/completions", request));
      expect(got.error, controllerSaid(bed)).toBeUndefined();
      expect(got.text).toBe(golden.text);
      expect(got.comments.length).toBeGreaterThan(0);
      expect(got.comments.join("\n")).toMatch(/^: waiting: \w/m);
      expect((await groupsOf(bed, "nano")).map(({ status }) => status.phase)).toEqual(["Serving"]);
      const events = await bed.plane.kubectl(["get", "events", "-o", "jsonpath={.items[*].message}"]);
      expect(events.stdout).toContain("1 replicas are wanted from 0");
    },
    2 * SERVE_MS_MAX,
  );
});
