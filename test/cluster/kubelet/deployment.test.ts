// From a ModelDeployment to tokens on a real control plane: the controller as its own process, pods bound by the real scheduler,
// workers as real processes on two nodes. Nothing is simulated but the nodes' GPUs, which the CPU engine does not need.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { installCrds, startController } from "./controller.ts";
import { Deployment, expectGolden, type Group, groupOnce, groupsOf, nanoDeployment, SERVE_MS_MAX } from "./serving.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const STEP_MS_MAX = SERVE_MS_MAX + 60_000;
const why = whyNoControlPlane();

const DEPLOYMENT = nanoDeployment({
  gpu: { count: 4, topology: { nodes: 2 } },
  parallelism: { tp: 4, ep: 2, etp: 2 },
});

describe.skipIf(why !== undefined)(
  `muster controller on a real control plane${why ? ` (skipped: ${why})` : ""}`,
  () => {
    let bed: Bed;

    beforeAll(async () => {
      bed = await Bed.start({
        nodes: [
          { name: "gpu-a", gpus: 2 },
          { name: "gpu-b", gpus: 2 },
        ],
      });
      await installCrds(bed);
      startController(bed);
    }, BED_TIMEOUT_MS);
    afterAll(async () => {
      await bed?.stop();
    });

    /** The group once it and its deployment say that this incarnation serves. */
    const serving = async (incarnation: number): Promise<Group> => {
      const isSo = ({ status }: Group) => status.phase === "Serving" && status.incarnation === incarnation;
      const group = await groupOnce(bed, "nano", { what: `serves as incarnation ${incarnation}`, isSo });
      const isSaid = async () => {
        const { status } = Deployment.parse(await bed.plane.api.find(`${OURS}/modeldeployments/nano`));
        return status.conditions.some(({ type, status: is }) => type === "Serving" && is === "True");
      };
      await until(isSaid, "the deployment says so");
      return group;
    };

    const pidOf = ({ node, pod }: Group["status"]["placement"][number]): number =>
      bed.kubelet(node).pids("default", pod).get("worker") ?? 0;

    test(
      "4 ranks over 2 nodes serve the golden tokens; columns say so",
      async () => {
        await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
        const group = await serving(1);
        expect(group.status.placement.map(({ node }) => node).toSorted()).toEqual(["gpu-a", "gpu-b"]);
        expect(group.status).toMatchObject({ ready: "4/4", restarts: 0 });
        await expectGolden(bed, group);
        const { stdout } = await bed.plane.kubectl(["get", "mdep", "nano"]);
        const [head = "", row = ""] = stdout.split("\n").map((line) => line.trim().replaceAll(/ {2,}/g, "|"));
        expect(head).toMatch(/^NAME\|PLAN\|READY\|PHASE\|TOK\/S\|ETA\|AGE$/);
        expect(row).toMatch(/^nano\|tp4·ep2.*\|4\/4\|Serving\|/);
      },
      STEP_MS_MAX,
    );

    test(
      "kill -9 of one worker: a new incarnation serves the same tokens",
      async () => {
        const [before] = await groupsOf(bed, "nano");
        const victim = before?.status.placement[1];
        if (victim === undefined || pidOf(victim) === 0) throw new Error("worker 1 does not run");
        process.kill(pidOf(victim), "SIGKILL");
        const group = await serving(2);
        expect(group.status.restarts).toBe(1);
        await expectGolden(bed, group);
      },
      STEP_MS_MAX,
    );

    test(
      "deleted, nothing is left",
      async () => {
        const placed = (await groupsOf(bed, "nano")).flatMap(({ status }) => status.placement);
        await bed.remove(`${OURS}/modeldeployments/nano`);
        const paths = [
          ...["modeldeployments", "shardplans", "replicagroups"].map((kind) => `${OURS}/${kind}`),
          POD_PATH,
        ];
        const isEmpty = async () => {
          const lists = await Promise.all(paths.map((path) => bed.plane.api.list(path)));
          return lists.every(({ items }) => items.length === 0);
        };
        await until(isEmpty, "objects and pods are gone", SERVE_MS_MAX);
        expect(placed.map(pidOf)).toEqual([0, 0]);
      },
      STEP_MS_MAX,
    );
  },
);
