// Whoever dies while a stream is under way, on a real control plane: workers, gateway, controller, nodes. Streams that can go on
// do so token for token, the rest is served again, and the invariants are looked at with every event, not at the end.
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { isAlive, until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, POD_PATH } from "./bed.ts";
import { type Answer, DEPLOYMENT, DisruptionBed, OURS, SERVE_MS_MAX } from "./disruption-bed.ts";

const STEP_MS_MAX = 2 * SERVE_MS_MAX;
const why = whyNoControlPlane();

describe.skipIf(why !== undefined)(`disruption on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let it: DisruptionBed;
  let expected: Answer;

  beforeAll(async () => {
    // Two that serve, two that may be avoided, two that may be dead.
    it = await DisruptionBed.start(6);
    it.startController();
    it.startController();
    await it.bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
    await it.startGateway("gateway-a");
    await it.startGateway("gateway-b");
    await it.serving();
    const { resumes, ...answer } = await it.answer("gateway-a");
    expect(resumes).toBe(0);
    expected = answer;
  }, BED_TIMEOUT_MS + SERVE_MS_MAX);
  afterEach(() => it.expectHeld());
  afterAll(async () => {
    await it?.stop();
  });

  /** The stream is what it was undisturbed, though its group has ended once. */
  async function expectResumed(got: Answer & { resumes: number }): Promise<void> {
    expect(got.resumes).toBeGreaterThan(0);
    expect({ ids: got.ids, texts: got.texts }).toEqual(expected);
  }

  test.each([
    { who: "the leader", worker: 0 },
    { who: "a follower", worker: 1 },
  ])(
    "kill -9 of $who: a new incarnation goes on with the stream",
    async ({ worker }) => {
      const before = await it.serving();
      it.allowRestart(before);
      await expectResumed(await it.answer("gateway-a", () => process.kill(it.pidOf(before, worker), "SIGKILL")));
      const after = await it.serving(before.status.incarnation);
      expect(after.status.restarts).toBe((before.status.restarts ?? 0) + 1);
    },
    STEP_MS_MAX,
  );

  test(
    "kill -9 of the controller that leads: no stream notices, and the other one looks after the group",
    async () => {
      const before = await it.serving();
      const [leader, holder] = [await it.leads(), await it.leader()];
      const got = await it.answer("gateway-a", () => it.kill(leader));
      expect(got).toEqual({ ...expected, resumes: 0 });
      const hasNext = async () => ![holder, ""].includes(await it.leader());
      await until(hasNext, "another controller leads", SERVE_MS_MAX);
      it.startController();
      expect((await it.serving()).status).toMatchObject({
        incarnation: before.status.incarnation,
        restarts: before.status.restarts,
      });
      // It is no ornament: what dies now is started again.
      it.allowRestart(before);
      process.kill(it.pidOf(await it.serving(), 1), "SIGKILL");
      await it.serving(before.status.incarnation);
    },
    STEP_MS_MAX,
  );

  test(
    "kill -9 of a gateway: its streams break, the other one gives the same answer at once",
    async () => {
      const before = await it.serving();
      const broken = it.answer("gateway-a", () => it.bed.plane.processes.kill("gateway-a"));
      await expect(broken).rejects.toThrow();
      expect(await it.answer("gateway-b")).toEqual({ ...expected, resumes: 0 });
      expect((await it.serving()).status.incarnation).toBe(before.status.incarnation);
    },
    STEP_MS_MAX,
  );

  test(
    "a node that dies: the group is placed without it and goes on with the stream",
    async () => {
      const before = await it.serving();
      const { node, pod } = it.seatOf(before, 1);
      it.allowRestart(before);
      await expectResumed(await it.answer("gateway-b", () => it.bed.kubelet(node).die()));
      const after = await it.serving(before.status.incarnation);
      expect(after.status.placement.map((each) => each.node)).not.toContain(node);
      await it.bed.kubelet(node).revive();
      await it.bed.gone(pod, SERVE_MS_MAX);
      await until(() => it.bed.isNodeReady(node), "the node is Ready again", SERVE_MS_MAX);
    },
    STEP_MS_MAX,
  );

  test(
    "a node that nobody hears, with a worker that is stopped and wakes: its zombie ends, and the stream goes on elsewhere",
    async () => {
      const before = await it.serving();
      const { node, pod } = it.seatOf(before, 0);
      const zombie = it.pidOf(before, 0);
      it.allowRestart(before);
      const got = it.answer("gateway-b", () => {
        it.bed.kubelet(node).sever();
        process.kill(zombie, "SIGSTOP");
      });
      await expectResumed(await got.finally(() => process.kill(zombie, "SIGCONT")));
      const after = await it.serving(before.status.incarnation);
      expect(after.status.placement.map((each) => each.node)).not.toContain(node);
      await until(() => !isAlive(zombie), "the zombie has ended", SERVE_MS_MAX);
      await it.bed.kubelet(node).revive();
      await it.bed.gone(pod, SERVE_MS_MAX);
    },
    STEP_MS_MAX,
  );

  test(
    "the witness can fail: a pod that is put by hand where no GPU is free",
    async () => {
      const { broken } = it.witness.invariants;
      const { node } = it.seatOf(await it.serving(), 0);
      const resources = { limits: { "nvidia.com/gpu": "1" } };
      const containers = [{ name: "main", image: "none", command: ["sleep", "1000"], resources }];
      await it.bed.make(POD_PATH, { metadata: { name: "thief" }, spec: { nodeName: node, containers } });
      const isSeen = () => broken.some((text) => text.endsWith(`D1: pods hold 2 of 1 GPUs of ${node}`));
      await until(isSeen, "it is seen", SERVE_MS_MAX);
      await it.bed.end("thief");
      const isOver = () => it.witness.invariants.objects("pods").every(({ metadata }) => metadata.name !== "thief");
      await until(isOver, "the witness sees its end");
      broken.length = 0;
    },
    STEP_MS_MAX,
  );

  test(
    "deleted, nothing is orphaned; every rule could have been broken",
    async () => {
      const before = await it.serving();
      const pids = [0, 1].map((worker) => it.pidOf(before, worker));
      await it.bed.remove(`${OURS}/modeldeployments/nano`);
      await it.gone();
      expect(pids.filter(isAlive)).toEqual([]);
      const { met } = it.witness.invariants;
      expect(Object.entries(met).filter(([, times]) => times === 0)).toEqual([]);
      process.stdout.write(`events: ${JSON.stringify([...it.witness.events])}; rules: ${JSON.stringify(met)}\n`);
    },
    STEP_MS_MAX,
  );
});
