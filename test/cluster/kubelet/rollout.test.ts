// Rolling updates under traffic that never pauses, on a real control plane: two checkpoints with different tokens, weights that
// come slowly, long streams. Every answer is compared with what the revision that it names answers: none may fail, be wrong or
// be mixed while a surge goes on, whoever dies or is replaced; in place a stream that cannot end is told why.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, POD_PATH } from "./bed.ts";
import { FIRST, IMAGE, LONG_TOKENS, long, OTHER, REPLICAS, RolloutBed, shorts } from "./rollout-bed.ts";
import { SERVE_MS_MAX } from "./serving.ts";

const NEXT_IMAGE = "muster/worker:next";
const STEP_MS_MAX = 3 * SERVE_MS_MAX;
const DRAIN_SECONDS = 2;
const why = whyNoControlPlane();

describe.skipIf(why !== undefined)(`rolling update on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let it: RolloutBed;

  beforeAll(async () => {
    it = await RolloutBed.start();
  }, BED_TIMEOUT_MS + SERVE_MS_MAX);
  afterAll(async () => {
    await it?.stop();
  }, SERVE_MS_MAX);

  /** What a new controller must leave as it is. */
  const standing = async () => ({
    groups: (await it.groups()).map(({ metadata, status }) => [metadata.uid, status.restarts]),
    pods: (await it.pods()).map(({ metadata, spec }) => [metadata.uid, spec.containers[0]?.image]),
    plans: (await it.plans()).map(({ metadata, spec }) => [metadata.uid, spec.image]),
  });

  test(
    "surge: new replicas first, while weights come slowly; long streams end on the revision they began on",
    async () => {
      const run = await it.traffic();
      const patchedMs = await it.patch({ model: { source: OTHER } });
      const { pulledBytes, ...times } = await it.surge(OTHER);
      expect(pulledBytes).toBeGreaterThan(0);
      await it.judge(run, [FIRST, OTHER], { patchedMs, ...times });
    },
    STEP_MS_MAX,
  );

  test(
    "a controller of the next version plans nothing anew and restarts nothing",
    async () => {
      const run = await it.traffic();
      const before = await standing();
      expect(before.plans.map(([, image]) => image)).toEqual([IMAGE, IMAGE]);
      const led = await it.leader();
      await it.end("controller", false);
      it.control("controller-b", NEXT_IMAGE);
      await it.when("the next controller leads", async () => !["", led].includes(await it.leader()));
      // Plans nothing anew either, and shows that it has looked.
      await it.patch({ rollout: { drainTimeout: "299s" } });
      const lookedMs = await it.when("it has looked", () => it.isOver(OTHER, REPLICAS));
      await run.answered(shorts, lookedMs, SERVE_MS_MAX);
      await run.stop();
      expect(await it.faults(run.answers)).toEqual([]);
      expect(await standing()).toEqual(before);
      const { conditions } = (await it.deployment()).status;
      expect(conditions.find(({ type }) => type === "BetterPlan")?.status ?? "False").toBe("False");
    },
    STEP_MS_MAX,
  );

  test(
    "a surge without room says what it needs and changes nothing; with room it goes on, over kill -9 of its controller",
    async () => {
      const run = await it.traffic();
      const before = await standing();
      const foreigners = ["foreign-a", "foreign-b"];
      for (const name of foreigners) await it.bed.make(POD_PATH, foreign(name));
      for (const name of foreigners) await it.bed.ready(name, SERVE_MS_MAX);
      const patchedMs = await it.patch({ model: { source: FIRST } });
      const short = `0 of ${REPLICAS} replaced, short`;
      await it.when("it is said", async () => (await it.deployment()).status.updated === short);
      const { phase, notices } = (await it.deployment()).status;
      expect(phase).toBe("Serving");
      expect(notices.map(({ message }) => message).join()).toMatch(
        /the new plan needs 1 more GPUs beside the old one; with rollout\.kind: inPlace it runs at 50% capacity/,
      );
      expect(await standing()).toEqual(before);

      it.control("controller-c", NEXT_IMAGE);
      await it.bed.end("foreign-a");
      const plan = await it.planOf(FIRST);
      const plansOfGroups = async () => new Set((await it.groups()).map(({ spec }) => spec.plan));
      await it.when("a new replica is made", async () => (await plansOfGroups()).has(plan?.metadata.name ?? ""));
      const led = await it.leader();
      await it.end("controller-b", true);
      expect((await plansOfGroups()).size).toBe(2);
      const times = await it.surge(FIRST);
      expect(await it.leader()).not.toBe(led);
      await it.judge(run, [OTHER, FIRST], { patchedMs, ...times });
      // The plan is older than the controllers: so is its image.
      for (const { spec } of await it.pods()) expect(spec.containers[0]?.image).toBe(IMAGE);
      await it.bed.end("foreign-b");
    },
    STEP_MS_MAX,
  );

  test(
    "in place: a stream that does not end within drainTimeout is told why; who asks meanwhile waits for the new one",
    async () => {
      await it.patch({ replicas: 1, rollout: { kind: "inPlace", drainTimeout: `${DRAIN_SECONDS}s` } });
      await it.when("one replica is left", () => it.isOver(FIRST, 1));
      const old = await it.fingerprint(FIRST);
      const { promise: begun, resolve } = Promise.withResolvers<void>();
      const cut = it.ask({ ...long, copies: 16 }, resolve);
      await begun;
      const patchedMs = await it.patch({ model: { source: OTHER } });
      const drainsMs = await it.when("the old one drains", async () => {
        return (await it.groups()).some(({ spec }) => spec.state === "Draining");
      });
      // What comes before the gateway has heard of it is one more stream of the old one, and may be cut as well.
      await it.when("nobody takes new requests", async () => (await it.taking()) === 0);
      const held = await Promise.all(shorts.map((question) => it.ask(question)));
      const overMs = await it.when("the new one serves alone", () => it.isOver(OTHER, 1));
      const answer = await cut;
      expect(answer.code, answer.failure).toBe("revision_changed");
      expect(answer.fingerprints).toEqual(new Set([old]));
      const right = (await it.expected()).get(old)?.get(long.name) ?? [];
      for (const [choice, ids] of answer.ids.entries()) {
        expect(ids).toEqual(right[choice % right.length]?.slice(0, ids.length));
      }
      const lengths = answer.ids.map(({ length }) => length);
      expect(Math.max(...lengths)).toBeGreaterThan(0);
      expect(Math.min(...lengths)).toBeLessThan(LONG_TOKENS);
      expect(await it.faults(held)).toEqual([]);
      const next = await it.fingerprint(OTHER);
      for (const { fingerprints } of held) expect(fingerprints).toEqual(new Set([next]));
      const seconds = (ms: number) => `${((ms - patchedMs) / 1000).toFixed(1)} s`;
      console.log(
        `in place: drains after ${seconds(drainsMs)}, stream ended after ${seconds(answer.endedMs)}, over after ${seconds(overMs)}`,
      );
    },
    STEP_MS_MAX,
  );
});

const foreign = (name: string) => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name },
  spec: {
    terminationGracePeriodSeconds: 1,
    containers: [
      { name: "main", image: "none", command: ["sleep", "100000"], resources: { limits: { "nvidia.com/gpu": 1 } } },
    ],
  },
});
