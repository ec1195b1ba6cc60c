// What leaders report, on a real control plane: numbers come into the columns, a rank that stands still is named within 5 s, and
// a node that is neither heard by the API server nor by the controller is given up at once. Workers are stopped as whole
// processes (SIGSTOP): their sockets stay open and nothing says that they have gone, as with a machine that hangs.
import { type ClientDuplexStream, credentials, type ServiceError, status } from "@grpc/grpc-js";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { GroupReport, ReportsClient } from "../../../proto/gen/muster/v1/report.ts";
import {
  Open,
  type SubmitRequest,
  type SubmitResponse,
  WorkerClient,
  WorkerPhase,
} from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { isAlive, until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";
import { controllerSaid, installCrds, startController } from "./controller.ts";
import { nanoDeployment, SERVE_MS_MAX } from "./serving.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const HTTP_PORT = 7443;
const REPORTS_PORT = 7441;
const FLAGS = { listen: `127.0.0.1:${REPORTS_PORT}`, advertise: "127.0.0.1", http: `127.0.0.1:${HTTP_PORT}` };
const STEP_MS_MAX = SERVE_MS_MAX + 60_000;
/** What is promised, on a machine that is busy with all of this. */
const NAMED_MS_MAX = 5_000;
/** From NotReady at the API server to the end of the incarnation. */
const GIVEN_UP_MS_MAX = 4_000;
const STREAMS = 4;
const TOKENS = 400;
const why = whyNoControlPlane();

const DEPLOYMENT = nanoDeployment({
  gpu: { count: 4, topology: { nodes: 2 } },
  parallelism: { tp: 4, ep: 2, etp: 2 },
});

const Group = z.looseObject({
  metadata: z.looseObject({ name: z.string(), namespace: z.string().optional() }),
  status: z
    .looseObject({
      phase: z.string().optional(),
      incarnation: z.number().optional(),
      restarts: z.number().default(0),
      leader: z.string().optional(),
      step: z.number().default(0),
      tokensPerSecond: z.number().default(0),
      record: z
        .looseObject({
          failures: z.array(z.object({ at: z.string(), detail: z.string(), isFinal: z.boolean() })),
          failedNodes: z.array(z.object({ node: z.string(), times: z.number() })).default([]),
        })
        .optional(),
      placement: z.array(z.looseObject({ worker: z.number(), node: z.string(), pod: z.string() })).default([]),
    })
    .default({ placement: [], restarts: 0, step: 0, tokensPerSecond: 0 }),
});
type Group = z.infer<typeof Group>;
type Seat = Group["status"]["placement"][number];
const Plan = z.looseObject({
  status: z.looseObject({ measured: z.record(z.string(), z.unknown()).default({}) }).default({ measured: {} }),
});
const Node = z.looseObject({
  status: z.looseObject({ conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })) }),
});

describe.skipIf(why !== undefined)(`reports on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    const nodes = ["gpu-a", "gpu-b", "gpu-c", "gpu-d"].map((name) => ({ name, gpus: 2 }));
    bed = await Bed.start({ nodes });
    await installCrds(bed);
    startController(bed, FLAGS);
    await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  async function group(): Promise<Group> {
    const [found] = (await bed.plane.api.list(`${OURS}/replicagroups`)).items;
    return Group.parse(found ?? { metadata: { name: "none" } });
  }

  /** The group once a whole incarnation serves that is newer than `after`. */
  async function serving(after: number): Promise<Group> {
    let found: Group | undefined;
    const isServing = async () => {
      if (!bed.plane.processes.isRunning("controller"))
        throw new Error(`the controller has ended: ${controllerSaid(bed)}`);
      found = await group();
      return found.status.phase === "Serving" && (found.status.incarnation ?? 0) > after;
    };
    await until(isServing, `an incarnation after ${after} serves`, SERVE_MS_MAX).catch(async (error) => {
      const pods = await bed.plane.kubectl(["get", "pods", "-o", "wide"]);
      throw new Error(`${error.message}; ${JSON.stringify(found?.status)}\n${pods.stdout}\n${controllerSaid(bed)}`);
    });
    return Group.parse(found);
  }

  const seatOf = ({ status }: Group, worker: number): Seat => {
    const seat = status.placement.find((each) => each.worker === worker);
    if (seat === undefined) throw new Error(`worker ${worker} has no place`);
    return seat;
  };
  const pidOf = ({ node, pod }: Seat): number => {
    const pid = bed.kubelet(node).pids("default", pod).get("worker");
    if (pid === undefined) throw new Error(`pod ${pod} does not run`);
    return pid;
  };

  /** Requests without an end, over one stream, until the leader is lost or `stop`. */
  async function traffic({ status }: Group): Promise<{ tokens: () => number; stop: () => Promise<void> }> {
    const [address = "", port = ""] = status.leader?.split(":") ?? [];
    const forward = await bed.plane.space.forward(address, Number(port));
    const client = new WorkerClient(`127.0.0.1:${forward.port}`, credentials.createInsecure(), channelOptions);
    const call: ClientDuplexStream<SubmitRequest, SubmitResponse> = client.submit();
    let [ids, tokens] = [0, 0];
    const open = () => {
      const input = { $case: "text", value: "Mr. Speaker," } as const;
      const value = Open.fromPartial({ id: ids++, input, maxTokens: TOKENS, ignoreEos: true });
      call.write({ incarnation: BigInt(status.incarnation ?? 0), kind: { $case: "open", value } });
    };
    call.on("data", ({ chunks }: SubmitResponse) => {
      for (const chunk of chunks) {
        tokens += chunk.tokens.length;
        if (chunk.finish !== undefined && chunk.finish.fault === undefined) open();
      }
    });
    call.on("error", () => {}); // the leader is lost, or we have enough
    for (let index = 0; index < STREAMS; index++) open();
    await until(() => tokens > 0, "tokens come");
    const stop = async () => {
      call.cancel();
      client.close();
      await forward.close();
    };
    return { tokens: () => tokens, stop };
  }

  /** The failure by which the incarnation of `before` has ended, once it is recorded. */
  async function failureAfter(before: Group): Promise<{ at: string; detail: string }> {
    let now = before;
    const hasEnded = async () => {
      now = await group();
      return now.status.restarts > before.status.restarts;
    };
    await until(hasEnded, "the incarnation ends", 60_000).catch((error) => {
      throw new Error(`${error.message}: ${JSON.stringify(now.status)}\n${controllerSaid(bed)}`);
    });
    const failure = now.status.record?.failures.at(-1);
    if (failure === undefined) throw new Error("no failure is recorded");
    return failure;
  }

  test(
    "under traffic the step grows, and TOK/S shows what is generated",
    async () => {
      const before = await serving(0);
      const load = await traffic(before);
      try {
        const isCounted = async () => (await group()).status.tokensPerSecond > 0;
        await until(isCounted, "tokens per second are measured", 60_000);
        const { step } = (await group()).status;
        const hasGrown = async () => (await group()).status.step > step;
        await until(hasGrown, "the step grows", 60_000);
        let row: string[] = [];
        const isShown = async () => {
          const { stdout } = await bed.plane.kubectl(["get", "mdep", "nano"]);
          const [head = "", line = ""] = stdout.split("\n").map((each) => each.trim().replaceAll(/ {2,}/g, "|"));
          row = line.split("|");
          return head.split("|")[4] === "TOK/S" && Number.parseFloat(row[4] ?? "") > 0;
        };
        await until(isShown, "kubectl shows tokens per second", 60_000);
        expect(row[3]).toBe("Serving");
        expect(load.tokens()).toBeGreaterThan(0);
        let measured: Record<string, unknown> = {};
        const isMeasured = async () => {
          const [plan] = (await bed.plane.api.list(`${OURS}/shardplans`)).items;
          ({ measured } = Plan.parse(plan).status);
          return Number(measured.tokensPerSecond) > 0;
        };
        await until(isMeasured, "the plan says what was measured", 60_000);
        expect(measured.concurrency).toBeGreaterThanOrEqual(1);
        expect(measured.concurrency).toBeLessThanOrEqual(STREAMS);
        // Nobody tells of clients here.
        expect(Object.keys(measured).filter((name) => /Ms$|latency/.test(name))).toEqual([]);
      } finally {
        await load.stop();
      }
    },
    STEP_MS_MAX,
  );

  test.each([
    { who: "a follower", worker: 1, rank: 2 },
    { who: "the leader", worker: 0, rank: 0 },
  ])(
    "$who that stands still is named within 5 s, and a new incarnation serves",
    async ({ worker, rank }) => {
      const before = await serving(0);
      const seat = seatOf(before, worker);
      const load = await traffic(before);
      try {
        const seen = (await group()).status.step;
        await until(async () => (await group()).status.step > seen, "work is under way", 60_000);
        process.kill(pidOf(seat), "SIGSTOP");
        const stoppedMs = Date.now();
        const { at, detail } = await failureAfter(before);
        expect(detail).toMatch(
          new RegExp(`^rank ${rank} on node ${seat.node} has not finished step \\d+ for \\d\\.\\d s$`),
        );
        const namedMs = Date.parse(at) - stoppedMs;
        process.stdout.write(`rank ${rank} was named ${namedMs} ms after it was stopped\n`);
        expect(namedMs).toBeGreaterThan(0);
        expect(namedMs).toBeLessThan(NAMED_MS_MAX);
      } finally {
        await load.stop();
      }
      const after = await serving(before.status.incarnation ?? 0);
      expect(after.status.record?.failedNodes).toContainEqual(expect.objectContaining({ node: seat.node }));
      await (await traffic(after)).stop();
    },
    STEP_MS_MAX,
  );

  test(
    "a node that is not Ready and whose worker is silent is given up at once; its zombie ends when it wakes, and is refused",
    async () => {
      const before = await serving(0);
      const seat = seatOf(before, 0);
      const zombie = pidOf(seat);
      const notReady = async () => {
        const { status } = Node.parse(await bed.plane.api.find(`/api/v1/nodes/${seat.node}`));
        return status.conditions.some((each) => each.type === "Ready" && each.status !== "True");
      };
      bed.kubelet(seat.node).sever();
      await until(notReady, "the node is not Ready", 120_000);
      // Its worker answers and reports: NotReady alone changes nothing.
      expect((await group()).status.restarts).toBe(before.status.restarts);
      const { uid } = (await bed.find(seat.pod))?.metadata ?? {};
      process.kill(zombie, "SIGSTOP");
      const stoppedMs = Date.now();
      try {
        const { at, detail } = await failureAfter(before);
        expect(detail).toContain(`node ${seat.node} does not report`);
        const givenUpMs = Date.parse(at) - stoppedMs;
        process.stdout.write(`the node was given up ${givenUpMs} ms after its worker fell silent\n`);
        expect(givenUpMs).toBeLessThan(GIVEN_UP_MS_MAX);
        const after = await serving(before.status.incarnation ?? 0);
        expect(after.status.placement.map(({ node }) => node)).not.toContain(seat.node);
        await (await traffic(after)).stop();
      } finally {
        process.kill(zombie, "SIGCONT");
      }
      // Whoever it was one with has gone: it has nothing to serve, and says so by ending.
      await until(() => !isAlive(zombie), "the zombie has ended", 60_000);
      const { namespace = "", name } = before.metadata;
      const said = { namespace, group: name, incarnation: BigInt(before.status.incarnation ?? 0), podUid: uid ?? "" };
      const refusal = await refusalOf(GroupReport.fromPartial({ ...said, phase: WorkerPhase.SERVING }));
      expect(refusal).toMatchObject({
        code: status.FAILED_PRECONDITION,
        details: expect.stringContaining("incarnation: "),
      });
      expect(await refusals()).toBeGreaterThan(0);
      expect((await group()).status.phase).toBe("Serving");
      await bed.kubelet(seat.node).revive();
      await until(() => bed.isNodeReady(seat.node), "the node is Ready again", 60_000);
      await bed.gone(seat.pod, 60_000);
      expect((await group()).status).toMatchObject({ phase: "Serving", restarts: before.status.restarts + 1 });
    },
    STEP_MS_MAX,
  );

  /** How the controller ends a stream that begins with this report. */
  async function refusalOf(report: GroupReport): Promise<ServiceError> {
    const forward = await bed.plane.space.forward("127.0.0.1", REPORTS_PORT);
    const client = new ReportsClient(`127.0.0.1:${forward.port}`, credentials.createInsecure(), channelOptions);
    try {
      const call = client.group();
      call.on("data", () => call.cancel());
      call.write(report);
      return await new Promise((resolve) => call.on("error", resolve));
    } finally {
      client.close();
      await forward.close();
    }
  }

  /** Streams that were ended because they were of another incarnation or pod. */
  async function refusals(): Promise<number> {
    const target = { address: "127.0.0.1", port: HTTP_PORT, path: "/metrics" };
    const { status, body } = await bed.plane.space.get(target, AbortSignal.timeout(10_000));
    expect(status).toBe(200);
    const [, count = "0"] = /^muster_reports_refused_total\{code="9"\} (\d+)$/m.exec(body) ?? [];
    return Number(count);
  }
});
