// Weights on a real control plane: pulled over HTTP by the workers themselves, mounted from a claim, behind a secret, as
// safetensors and as GGUF. The controller reads no file of a claim and no Secret; what it knows of those sources, pods have told.
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { makeClaim } from "./claims.ts";
import { installCrds, startController } from "./controller.ts";
import { answersOf, Deployment, expectGolden, groupOnce, groupsOf, SERVE_MS_MAX, serving } from "./serving.ts";

const ROOT = join(import.meta.dirname, "../../..");
const MODEL = join(ROOT, "test/models/nano-maverick");
const CORE = "/api/v1/namespaces/default";
const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const OPEN_PORT = 8090;
const CLOSED_PORT = 8091;
const REPORTS_PORT = 7441;
const TOKEN = "let-me-in";
const STEP_MS_MAX = SERVE_MS_MAX + 60_000;
const why = whyNoControlPlane();

const Asked = z.array(z.object({ path: z.string(), range: z.string(), isKnown: z.boolean() }));
const Names = z.object({ items: z.array(z.looseObject({ metadata: z.looseObject({ name: z.string() }) })) });

const deployment = (name: string, model: object, gpu: object = { count: 4, topology: { nodes: 2 } }) => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name },
  spec: { model, gpu, slo: { concurrency: 8 }, rollout: { drainTimeout: "5s" } },
});

describe.skipIf(why !== undefined)(`weights on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "gpu-a", gpus: 2 },
        { name: "gpu-b", gpus: 2 },
      ],
    });
    await installCrds(bed);
    host("open", OPEN_PORT, []);
    host("closed", CLOSED_PORT, [TOKEN]);
    const answers = (port: number) => tell(port, "/asked").then(Boolean, () => false);
    for (const port of [OPEN_PORT, CLOSED_PORT]) await until(() => answers(port), `the server at ${port} answers`);
    startController(bed, { listen: `127.0.0.1:${REPORTS_PORT}`, advertise: "127.0.0.1" });
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });
  afterEach(async () => {
    for (const item of (await bed.plane.api.list(`${OURS}/modeldeployments`)).items) {
      const { metadata } = z.looseObject({ metadata: z.looseObject({ name: z.string() }) }).parse(item);
      await bed.remove(`${OURS}/modeldeployments/${metadata.name}`);
    }
    const isEmpty = async () => (await bed.plane.api.list(POD_PATH)).items.length === 0;
    await until(isEmpty, "pods are gone", SERVE_MS_MAX);
  }, STEP_MS_MAX);

  function host(id: string, port: number, args: readonly string[]): void {
    bed.plane.processes.spawn({
      id,
      ...bed.plane.space.inside(process.execPath, [
        join(import.meta.dirname, "file-host.mjs"),
        ...[String(port), MODEL, ...args],
      ]),
      env: { PATH: process.env.PATH ?? "" },
      log: join(bed.plane.dir, `${id}.log`),
      watchesStdin: false,
    });
  }

  const tell = async (port: number, path: string) =>
    (await bed.plane.space.get({ address: "127.0.0.1", port, path }, AbortSignal.timeout(5_000))).body;
  const podNames = async () =>
    Names.parse(await bed.plane.api.list(POD_PATH)).items.map(({ metadata }) => metadata.name);

  test(
    "two workers pull over http, are seen pulling, and serve the golden tokens",
    async () => {
      await tell(OPEN_PORT, "/hold");
      await bed.make(`${OURS}/modeldeployments`, deployment("pulled", { source: `http://127.0.0.1:${OPEN_PORT}/m/` }));
      const pulling = await groupOnce(bed, "pulled", {
        what: "is pulling, with bytes",
        isSo: ({ status }) => status.phase === "Pulling" && (status.cause?.bytesLoaded ?? 0) > 0,
      });
      const { bytesLoaded = 0, bytesTotal = 0 } = pulling.status.cause ?? {};
      expect(pulling.status.cause?.code).toBe("pulling");
      expect(bytesLoaded).toBeLessThan(bytesTotal);
      await tell(OPEN_PORT, "/release");
      const group = await serving(bed, "pulled");
      expect(group.status).toMatchObject({ ready: "4/4", restarts: 0 });
      await expectGolden(bed, group);
    },
    STEP_MS_MAX,
  );

  test(
    "GGUF over http: the same tokens as the built-in file's",
    async () => {
      await tell(OPEN_PORT, "/release");
      const one = { count: 1 };
      const url = `http://127.0.0.1:${OPEN_PORT}/m/nano-maverick-Q8_0.gguf`;
      await bed.make(`${OURS}/modeldeployments`, deployment("gguf", { source: url }, one));
      await bed.make(`${OURS}/modeldeployments`, deployment("own", { source: "builtin://nano-maverick-q8_0" }, one));
      const [pulled, own] = await Promise.all([serving(bed, "gguf"), serving(bed, "own")]);
      expect(await answersOf(bed, pulled)).toEqual(await answersOf(bed, own));
    },
    STEP_MS_MAX,
  );

  test(
    "pvc: a pod looks, the claim is mounted by both workers, golden tokens",
    async () => {
      await makeClaim(bed, "weights", ["gpu-a", "gpu-b"]);
      await bed.make(`${OURS}/modeldeployments`, deployment("claimed", { source: "pvc://weights/models/nano" }));
      const group = await serving(bed, "claimed");
      await expectGolden(bed, group);
      const pod = await bed.plane.api.find(`${POD_PATH}/${group.status.placement[1]?.pod}`);
      expect(JSON.stringify(pod)).toContain('"persistentVolumeClaim":{"claimName":"weights","readOnly":true}');
      // What has looked is gone.
      expect((await podNames()).filter((name) => name.includes("-inspect-"))).toEqual([]);
    },
    STEP_MS_MAX,
  );

  test(
    "a claim that is not there, and a volume that the nodes of the plan do not reach, are Infeasible with the reason",
    async () => {
      await bed.make(`${OURS}/modeldeployments`, deployment("missing", { source: "pvc://nowhere/x" }));
      await expectCause("missing", /claim nowhere is not there/);
      await makeClaim(bed, "far", ["gpu-c"]);
      await bed.make(`${OURS}/modeldeployments`, deployment("far", { source: "pvc://far/models/nano" }));
      await expectCause("far", /kubernetes\.io\/hostname In \[gpu-c\]/);
      expect(await groupsOf(bed, "far")).toEqual([]);
    },
    STEP_MS_MAX,
  );

  test(
    "behind a secret: pods alone hold it; a wrong one is said",
    async () => {
      await tell(CLOSED_PORT, "/release");
      await bed.make(`${CORE}/secrets`, secret("wrong", "no"));
      const source = `http://127.0.0.1:${CLOSED_PORT}/m/`;
      const auth = { secretName: "hub" };
      await bed.make(`${OURS}/modeldeployments`, deployment("locked", { source, auth: { secretName: "wrong" } }));
      await expectCause("locked", /refuses access \(HTTP 401\)/);
      await bed.make(`${CORE}/secrets`, secret("hub", TOKEN));
      await bed.remove(`${OURS}/modeldeployments/locked`);
      await until(async () => (await podNames()).length === 0, "the pod with the wrong secret is gone");
      await tell(CLOSED_PORT, "/hold"); // forgets who has asked
      await tell(CLOSED_PORT, "/release");
      await bed.make(`${OURS}/modeldeployments`, deployment("private", { source, auth }));
      const group = await serving(bed, "private");
      await expectGolden(bed, group);
      const asked = Asked.parse(JSON.parse(await tell(CLOSED_PORT, "/asked")));
      // Whoever has no secret, the controller above all, has not asked at all.
      expect(asked.length).toBeGreaterThan(0);
      expect(asked.filter(({ isKnown }) => !isKnown)).toEqual([]);
    },
    STEP_MS_MAX,
  );

  async function expectCause(name: string, message: RegExp): Promise<void> {
    let seen: unknown;
    const isSaid = async () => {
      const { status } = Deployment.parse(await bed.plane.api.find(`${OURS}/modeldeployments/${name}`));
      seen = status;
      return status.phase === "Infeasible" && message.test(status.cause?.message ?? "");
    };
    await until(isSaid, `${name} is Infeasible: ${message}`, SERVE_MS_MAX).catch((error) => {
      throw new Error(`${error.message}; ${JSON.stringify(seen)}`);
    });
  }

  const secret = (name: string, token: string) => ({
    apiVersion: "v1",
    kind: "Secret",
    metadata: { name },
    stringData: { token },
  });
});
