// From a ModelDeployment to tokens on a real control plane: the controller as its own process, pods bound by the real scheduler,
// workers as real processes on two nodes. Nothing is simulated but the nodes' GPUs, which the CPU engine does not need.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { credentials } from "@grpc/grpc-js";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { type Chunk, Open, type SubmitResponse, WorkerClient } from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { controllerSaid, installCrds, startController } from "./controller.ts";

const ROOT = join(import.meta.dirname, "../../..");
const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const GAP_MIN = 1e-3;
/** Four engines, a control plane and the test share a small machine. */
const SERVE_MS_MAX = 180_000;
const STEP_MS_MAX = SERVE_MS_MAX + 60_000;
const why = whyNoControlPlane();

const DEPLOYMENT = {
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "nano" },
  spec: {
    model: { source: "builtin://nano-maverick" },
    gpu: { count: 4, topology: { nodes: 2 } },
    parallelism: { tp: 4, ep: 2, etp: 2 },
    slo: { concurrency: 8 },
    rollout: { drainTimeout: "5s" },
  },
};

const Golden = z.object({
  greedy: z.array(
    z.object({
      prompt_ids: z.array(z.number()),
      greedy: z.array(z.number()),
      min_top2_gap: z.number(),
      text: z.string(),
    }),
  ),
});
const Group = z.looseObject({
  metadata: z.looseObject({ name: z.string() }),
  status: z
    .looseObject({
      phase: z.string().optional(),
      incarnation: z.number().optional(),
      restarts: z.number().optional(),
      leader: z.string().optional(),
      placement: z.array(z.looseObject({ worker: z.number(), node: z.string(), pod: z.string() })).default([]),
    })
    .default({ placement: [] }),
});
type Group = z.infer<typeof Group>;
const Deployment = z.looseObject({
  status: z
    .looseObject({
      conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })).default([]),
      cause: z.looseObject({ message: z.string() }).optional(),
    })
    .default({ conditions: [] }),
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

    const groups = async () =>
      (await bed.plane.api.list(`${OURS}/replicagroups`)).items.map((item) => Group.parse(item));
    const deployment = async () => Deployment.parse(await bed.plane.api.find(`${OURS}/modeldeployments/nano`));

    /** The group once it and its deployment say that this incarnation serves. */
    async function serving(incarnation: number): Promise<Group> {
      let found: Group | undefined;
      const isServing = async () => {
        if (!bed.plane.processes.isRunning("controller"))
          throw new Error(`the controller has ended: ${controllerSaid(bed)}`);
        const { status } = await deployment();
        [found] = await groups();
        const isSaid = status.conditions.some(({ type, status: is }) => type === "Serving" && is === "True");
        return isSaid && found?.status.phase === "Serving" && found.status.incarnation === incarnation;
      };
      await until(isServing, `incarnation ${incarnation} serves`, SERVE_MS_MAX).catch(async (error) => {
        const { status } = await deployment();
        const pods = await bed.plane.kubectl(["get", "pods", "-o", "wide"]);
        throw new Error(
          `${error.message}; ${status.cause?.message}; ${JSON.stringify(found?.status)}\n${pods.stdout}\n${controllerSaid(bed)}`,
        );
      });
      return Group.parse(found);
    }

    async function expectGolden({ status }: Group): Promise<void> {
      const [address = "", port = ""] = status.leader?.split(":") ?? [];
      const forward = await bed.plane.space.forward(address, Number(port));
      const client = new WorkerClient(`127.0.0.1:${forward.port}`, credentials.createInsecure(), channelOptions);
      try {
        const golden = Golden.parse(
          JSON.parse(readFileSync(join(ROOT, "test/models/nano-maverick/golden.json"), "utf8")),
        );
        const sure = golden.greedy.filter(({ min_top2_gap }) => min_top2_gap > GAP_MIN);
        expect(sure.length).toBeGreaterThan(0);
        const call = client.submit();
        const chunks = sure.map((): Chunk[] => []);
        for (const [id, { prompt_ids: ids, greedy }] of sure.entries()) {
          const open = {
            id,
            input: { $case: "prompt", value: { ids } },
            maxTokens: greedy.length,
            ignoreEos: true,
          } as const;
          const kind = { $case: "open", value: Open.fromPartial(open) } as const;
          call.write({ incarnation: BigInt(status.incarnation ?? 0), kind });
        }
        call.end();
        const responses: AsyncIterable<SubmitResponse> = call;
        for await (const response of responses) for (const chunk of response.chunks) chunks[chunk.id]?.push(chunk);
        for (const [index, { greedy, text }] of sure.entries()) {
          expect(chunks[index]?.flatMap(({ tokens }) => tokens)).toEqual(greedy);
          expect(chunks[index]?.map((chunk) => chunk.text).join("")).toBe(text);
        }
      } finally {
        client.close();
        await forward.close();
      }
    }

    const pidOf = ({ node, pod }: Group["status"]["placement"][number]): number =>
      bed.kubelet(node).pids("default", pod).get("worker") ?? 0;

    test(
      "4 ranks over 2 nodes serve the golden tokens; columns say so",
      async () => {
        await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
        const group = await serving(1);
        expect(group.status.placement.map(({ node }) => node).toSorted()).toEqual(["gpu-a", "gpu-b"]);
        expect(group.status).toMatchObject({ ready: "4/4", restarts: 0 });
        await expectGolden(group);
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
        const [before] = await groups();
        const victim = before?.status.placement[1];
        if (victim === undefined || pidOf(victim) === 0) throw new Error("worker 1 does not run");
        process.kill(pidOf(victim), "SIGKILL");
        const group = await serving(2);
        expect(group.status.restarts).toBe(1);
        await expectGolden(group);
      },
      STEP_MS_MAX,
    );

    test(
      "deleted, nothing is left",
      async () => {
        const placed = (await groups()).flatMap(({ status }) => status.placement);
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
