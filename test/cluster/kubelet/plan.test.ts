// `muster plan -f` against a kubeconfig names the nodes and the cut that the controller then binds: for each wish the command is
// asked first, then the wish is applied, then both are compared. Pods are bound by the real scheduler.
import { execFile } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { stringify } from "yaml";
import { z } from "zod";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { controllerSaid, installCrds, MAIN, startController } from "./controller.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const BOUND_MS_MAX = 60_000;
const STEP_MS_MAX = 180_000;
const why = whyNoControlPlane();

const Cut = z.record(z.string(), z.number());
const Worker = z.object({ worker: z.number(), node: z.string(), devices: z.number() });
const Owner = z.looseObject({
  outcome: z.enum(["fits", "short", "infeasible", "refused", "failed"]),
  plan: z.looseObject({ name: z.string(), revision: z.string(), cut: Cut }).optional(),
  places: z.array(z.looseObject({ group: z.string(), isNew: z.boolean(), workers: z.array(Worker) })).default([]),
  waiting: z.array(z.looseObject({ group: z.string(), text: z.string() })).default([]),
});
const Answer = z.looseObject({ owners: z.array(Owner) });
const Pod = z.looseObject({
  metadata: z.looseObject({ labels: z.record(z.string(), z.string()).default({}) }),
  spec: z.looseObject({
    nodeName: z.string().optional(),
    containers: z.array(z.looseObject({ resources: z.looseObject({ limits: z.record(z.string(), z.string()) }) })),
  }),
});
const Plan = z.looseObject({ spec: z.looseObject({ revision: z.string(), cut: Cut }) });
const Deployment = z.looseObject({
  status: z
    .looseObject({ phase: z.string().optional(), cause: z.looseObject({ message: z.string() }).optional() })
    .default({}),
});

const mdep = (name: string, spec: Record<string, unknown>) => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name },
  spec: { model: { source: "builtin://nano-maverick" }, rollout: { drainTimeout: "1s" }, ...spec },
});

describe.skipIf(why !== undefined)(`muster plan against a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "gpu-a", gpus: 2 },
        { name: "gpu-b", gpus: 4, labels: { rack: "one" } },
        { name: "gpu-c", gpus: 4 },
        { name: "gpu-d", gpus: 8, labels: { rack: "two" } },
      ],
    });
    await installCrds(bed);
    await holdGpus(bed, "trainer", { node: "gpu-c", gpus: 2 });
    startController(bed);
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  async function planned(object: unknown, ...flags: string[]): Promise<z.infer<typeof Owner> & { code: number }> {
    const file = join(bed.plane.dir, "mdep.yaml");
    writeFileSync(file, stringify(object));
    const args = [MAIN, "plan", "-f", file, "--kubeconfig", bed.plane.kubeconfig, "--json", ...flags];
    const said = await new Promise<{ code: number; out: string; err: string }>((done) => {
      execFile(process.execPath, args, (error, out, err) =>
        done({ code: typeof error?.code === "number" ? error.code : 0, out, err }),
      );
    });
    expect(said.err).toBe("");
    const [owner] = Answer.parse(JSON.parse(said.out)).owners;
    return { ...Owner.parse(owner), code: said.code };
  }

  /** What the controller has bound: `group worker node devices`, sorted; undefined while a pod of it is not. */
  async function boundOf(deployment: string, pods: number): Promise<string[] | undefined> {
    const { items } = await bed.plane.api.list(`${POD_PATH}?labelSelector=muster.dev%2Fdeployment%3D${deployment}`);
    const seats = items.map((item) => Pod.parse(item));
    if (seats.length < pods || seats.some(({ spec }) => spec.nodeName === undefined)) return undefined;
    return seats
      .map(({ metadata: { labels }, spec }) => {
        const gpus = spec.containers[0]?.resources.limits["nvidia.com/gpu"];
        return `${labels["muster.dev/group"]} ${labels["muster.dev/worker"]} ${spec.nodeName} ${gpus}`;
      })
      .toSorted();
  }

  /** Applied for real: the pods are where the answer says, made from the plan of the answer. */
  async function expectBound(object: ReturnType<typeof mdep>, answer: z.infer<typeof Owner>): Promise<void> {
    const { name } = object.metadata;
    await bed.make(`${OURS}/modeldeployments`, object);
    await expectSeats(name, answer);
  }

  async function expectSeats(name: string, { places, plan }: z.infer<typeof Owner>): Promise<void> {
    const foreseen = places
      .flatMap(({ group, workers }) => workers.map((each) => `${group} ${each.worker} ${each.node} ${each.devices}`))
      .toSorted();
    expect(foreseen.length).toBeGreaterThan(0);
    let bound: string[] | undefined;
    const isBound = async () => (bound = await boundOf(name, foreseen.length)) !== undefined;
    await until(isBound, `the pods of ${name} are bound`, BOUND_MS_MAX).catch((error) => {
      throw new Error(`${error.message}\n${controllerSaid(bed)}`);
    });
    expect(bound).toEqual(foreseen);
    const stored = Plan.parse(await bed.plane.api.find(`${OURS}/shardplans/${plan?.name}`)).spec;
    expect({ revision: stored.revision, cut: stored.cut }).toEqual({ revision: plan?.revision, cut: plan?.cut });
  }

  test(
    "one group over two nodes, one on one node, two replicas behind a selector: nodes, GPUs and cut are those foreseen",
    async () => {
      const wishes = [
        mdep("wide", { gpu: { count: 4, topology: { nodes: 2 } }, parallelism: { tp: 4, ep: 2, etp: 2 } }),
        mdep("tall", { gpu: { count: 4 } }),
        mdep("pair", { gpu: { count: 2, nodeSelector: { rack: "two" } }, replicas: 2 }),
      ];
      for (const wish of wishes) {
        const answer = await planned(wish);
        expect(answer).toMatchObject({ outcome: "fits", code: 0 });
        await expectBound(wish, answer);
      }
    },
    STEP_MS_MAX,
  );

  test("asked again it is bound already, from the stored plan; one replica more is the one that is bound", async () => {
    const again = await planned(mdep("tall", { gpu: { count: 4 } }));
    expect(again).toMatchObject({ outcome: "fits", code: 0, plan: { isStored: true } });
    expect(again.places.map(({ isNew }) => isNew)).toEqual([false]);
    await expectSeats("tall", again);
    const more = await planned(mdep("pair", { gpu: { count: 2, nodeSelector: { rack: "two" } }, replicas: 3 }));
    expect(more.places.map(({ isNew }) => isNew)).toEqual([false, false, true]);
    await bed.plane.kubectl(["scale", "mdep", "pair", "--replicas=3"]);
    await expectSeats("pair", more);
  });

  test(
    "what-if delete: the nodes foreseen are those bound once it is gone",
    async () => {
      const wish = mdep("next", { gpu: { count: 4 }, parallelism: { tp: 4 } });
      const before = await planned({
        ...wish,
        spec: { ...wish.spec, gpu: { count: 4, nodeSelector: { rack: "one" } } },
      });
      expect(before).toMatchObject({ outcome: "short", code: 3 });
      const answer = await planned(wish, "--what-if", "delete=tall", "--what-if", "nodes-=gpu-d");
      expect(answer).toMatchObject({ outcome: "fits" });
      await bed.remove(`${OURS}/modeldeployments/tall`);
      await until(async () => (await boundOf("tall", 0))?.length === 0, "tall is gone", BOUND_MS_MAX);
      await bed.plane.kubectl(["cordon", "gpu-d"]);
      await until(async () => !(await bed.isNodeReady("gpu-d")), "gpu-d is cordoned", BOUND_MS_MAX);
      await expectBound(wish, answer);
      await bed.plane.kubectl(["uncordon", "gpu-d"]);
    },
    STEP_MS_MAX,
  );

  test(
    "too little free: it says what is needed, the controller waits too, and a node that comes is the one foreseen",
    async () => {
      const wish = mdep("late", { gpu: { count: 8 } });
      const short = await planned(wish);
      expect(short).toMatchObject({ outcome: "short", code: 3, places: [] });
      expect(short.waiting[0]?.text).toMatch(/1 node with 8 free GPUs is needed/);
      const answer = await planned(wish, "--what-if", "nodes+=1xH200x8");
      expect(answer.places.map(({ workers }) => workers.map(({ node }) => node))).toEqual([["new-1"]]);
      await bed.make(`${OURS}/modeldeployments`, wish);
      let last: unknown;
      const isSaid = async () => {
        const { status } = Deployment.parse(await bed.plane.api.find(`${OURS}/modeldeployments/late`));
        last = status.cause;
        return status.phase === "CapacityShort";
      };
      await until(isSaid, "late says that it waits for GPUs", BOUND_MS_MAX).catch((error) => {
        throw new Error(`${error.message}; it says ${JSON.stringify(last)}\n${controllerSaid(bed)}`);
      });
      await bed.nodes.add({ name: "new-1", gpus: 8 });
      await expectSeats("late", answer);
    },
    STEP_MS_MAX,
  );
});

/** A pod of somebody else that holds GPUs of a node. */
async function holdGpus(bed: Bed, name: string, { node, gpus }: { node: string; gpus: number }): Promise<void> {
  const resources = { limits: { "nvidia.com/gpu": String(gpus) } };
  const containers = [{ name: "main", image: "none", command: ["sleep", "infinity"], resources }];
  await bed.make(POD_PATH, { metadata: { name }, spec: { nodeName: node, containers } });
  await bed.seen(name, "runs", ({ status }) => status.phase === "Running");
}
