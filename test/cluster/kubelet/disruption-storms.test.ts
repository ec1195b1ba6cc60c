// An API server that goes, comes back, refuses, forgets and dawdles, on a real control plane: streams go on token for token over
// the death of a worker meanwhile, what is asked for comes about, and the invariants are looked at with every event. What goes
// wrong is drawn from a seed; in which order requests come is the machine's.
//
// Always: one seed for each storm. With MUSTER_TEST_LONG=1: SEEDS_LONG.
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS } from "./bed.ts";
import { type Answer, DEPLOYMENT, DisruptionBed, OURS, SERVE_MS_MAX } from "./disruption-bed.ts";
import { calm, type Moods } from "./moods.ts";
import { groupsOf } from "./serving.ts";

const isLong = process.env.MUSTER_TEST_LONG === "1";
const SEEDS_LONG = 6;
const STEP_MS_MAX = 3 * SERVE_MS_MAX;
/** The default: a storm is no reason for another to lead, except where renewals fail for ten seconds. */
const LEASE_SECONDS = 15;
/** An incarnation that ends because a start could not be finished under a storm, beside the one that is killed. */
/** Of scaling up and down, in one storm. */
const ROUNDS_MAX = 8;
const MORE_RESTARTS_MAX = 3;
const why = whyNoControlPlane();

const STORMS: readonly { name: string; moods: Partial<Moods> }[] = [
  { name: "watches that drop and expire (410)", moods: { watchBreak: 0.1, watchGone: 0.1 } },
  {
    name: "409, 429 and 5xx, refused connections, lost answers",
    moods: {
      conflict: 0.2,
      tooMany: 0.1,
      unavailable: 0.05,
      internal: 0.05,
      unreachable: 0.05,
      loseReply: 0.1,
    },
  },
  { name: "an API that is slow", moods: { latencyMs: [50, 400], slow: 0.05, slowMs: [1_000, 6_000] } },
  {
    name: "all at once",
    moods: {
      conflict: 0.1,
      tooMany: 0.05,
      unavailable: 0.03,
      internal: 0.03,
      unreachable: 0.03,
      loseReply: 0.05,
      watchBreak: 0.05,
      watchGone: 0.05,
      latencyMs: [10, 200],
      slow: 0.02,
      slowMs: [500, 3_000],
    },
  },
];
const CASES = STORMS.flatMap((storm, index) =>
  Array.from({ length: isLong ? SEEDS_LONG : 1 }, (_, at) => ({ ...storm, seed: 1 + index + at * STORMS.length })),
);

describe.skipIf(why !== undefined)(`an API server that fails${why ? ` (skipped: ${why})` : ""}`, () => {
  let it: DisruptionBed;
  let expected: Answer;

  beforeAll(async () => {
    it = await DisruptionBed.start(8);
    for (const _ of ["one that leads", "another"]) it.startController(undefined, LEASE_SECONDS);
    await it.bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
    await it.startGateway("gateway");
    await it.serving();
    const { resumes, ...answer } = await it.answer("gateway");
    expect(resumes).toBe(0);
    expected = answer;
  }, BED_TIMEOUT_MS + SERVE_MS_MAX);
  afterEach(() => it.expectHeld());
  afterAll(async () => {
    await it?.stop();
  });

  const scale = async (replicas: number) => {
    const path = `${OURS}/modeldeployments/nano`;
    await it.bed.plane.api.ask({ method: "PATCH", path, patch: "merge-patch", body: { spec: { replicas } } });
    const isSo = async () => {
      it.expectHeld();
      const groups = await groupsOf(it.bed, "nano");
      return groups.length === replicas && groups.every(({ status }) => status.phase === "Serving");
    };
    await until(isSo, `${replicas} replicas serve`, SERVE_MS_MAX).catch((error) => it.explain(error));
  };

  /** The same deployment with groups that have never failed: ten failures within five minutes are enough for any. */
  async function renew(): Promise<void> {
    await it.bed.remove(`${OURS}/modeldeployments/nano`);
    await it.gone();
    await it.bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
    await it.serving();
  }

  test(
    "it is killed mid-stream: no stream notices, and back again it is believed",
    async () => {
      const before = await it.serving();
      const got = await it.answer("gateway", () => it.bed.plane.killApiServer());
      expect(got).toEqual({ ...expected, resumes: 0 });
      await it.bed.plane.restartApiServer();
      const after = await it.serving();
      expect(after.status).toMatchObject({
        incarnation: before.status.incarnation,
        restarts: before.status.restarts,
      });
    },
    STEP_MS_MAX,
  );

  test(
    "a worker dies while it is away: the stream is held until it is back, and goes on",
    async () => {
      const before = await it.serving();
      it.allowRestart(before);
      const pid = it.pidOf(before, 1);
      const got = await it.answer("gateway", async () => {
        await it.bed.plane.killApiServer();
        process.kill(pid, "SIGKILL");
        await it.bed.plane.restartApiServer();
      });
      expect(got.resumes).toBeGreaterThan(0);
      expect({ ids: got.ids, texts: got.texts }).toEqual(expected);
      await it.serving(before.status.incarnation);
    },
    STEP_MS_MAX,
  );

  test.each(CASES)(
    "$name, seed $seed",
    async ({ moods, seed }) => {
      if (isLong) await renew();
      const before = await it.serving();
      const { happened } = it.proxy;
      happened.clear();
      const isChance = (mood: string) => !mood.endsWith("Ms");
      const missing = () =>
        Object.keys(moods).filter((mood) => isChance(mood) && !new Set<string>(happened.keys()).has(mood));
      const beganMs = performance.now();
      it.proxy.turn({ ...calm, ...moods }, seed);
      it.allowRestart(before, MORE_RESTARTS_MAX);
      try {
        const got = await it.answer("gateway", () => process.kill(it.pidOf(before, seed % 2), "SIGKILL"));
        expect(got.resumes).toBeGreaterThan(0);
        expect({ ids: got.ids, texts: got.texts }).toEqual(expected);
        await it.serving(before.status.incarnation);
        // Until all that was to go wrong has: how often the controller asks is not in anybody's hand.
        for (let round = 0; round === 0 || (missing().length > 0 && round < ROUNDS_MAX); round++) {
          await scale(2);
          await scale(1);
        }
      } finally {
        it.proxy.turn(calm);
      }
      const took = ((performance.now() - beganMs) / 1000).toFixed(1);
      process.stdout.write(`seed ${seed}: ${took} s, ${JSON.stringify(Object.fromEntries(happened))}\n`);
      expect(missing()).toEqual([]);
    },
    STEP_MS_MAX,
  );

  test(
    "the controller that leads dies in a storm: another one looks after the group",
    async () => {
      const [before, leader, holder] = [await it.serving(), await it.leads(), await it.leader()];
      it.proxy.turn({ ...calm, ...STORMS.at(-1)?.moods }, 77);
      it.allowRestart(before, MORE_RESTARTS_MAX);
      it.kill(leader);
      const killedMs = performance.now();
      process.kill(it.pidOf(before, 1), "SIGKILL");
      const hasNext = async () => ![holder, ""].includes(await it.leader());
      await until(hasNext, "another controller leads", SERVE_MS_MAX).catch((error) => it.explain(error));
      const took = ((performance.now() - killedMs) / 1000).toFixed(1);
      process.stdout.write(`another one leads after ${took} s, with a lease of ${LEASE_SECONDS} s\n`);
      await it.serving(before.status.incarnation);
    },
    STEP_MS_MAX,
  );

  test(
    "deleted under a storm, nothing is orphaned",
    async () => {
      it.proxy.turn({ ...calm, ...STORMS.at(-1)?.moods }, 99);
      await it.bed.remove(`${OURS}/modeldeployments/nano`);
      await it.gone();
    },
    STEP_MS_MAX,
  );
});
