// The controller dies at every step of a whole life: before each of its writes, and after each whose answer it never gets. Another
// one takes over and comes to the same end, with the invariants looked at on every event. A life: deployed, serving, a worker
// killed, recovered, scaled up, scaled down, deleted.
//
// Always: each kind of write (verb, kind, subresource) is a crash point twice, before and after. With MUSTER_TEST_LONG=1: each
// single write of a life, by object and by what a status changes; DEATHS_MAX of them to a life.
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { fieldsOf } from "../../../controller/kube/api/fields.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import type { Step } from "./api-proxy.ts";
import { BED_TIMEOUT_MS } from "./bed.ts";
import { DEPLOYMENT, DisruptionBed, OURS, SERVE_MS_MAX } from "./disruption-bed.ts";
import { groupsOf } from "./serving.ts";

const isLong = process.env.MUSTER_TEST_LONG === "1";
const DEATHS_MAX = 24;
const WHENS = ["before", "after"] as const;
const LIVES_MAX = isLong ? 16 : 4;
const LIFE_MS_MAX = 5 * SERVE_MS_MAX;
/** Beyond the one that the test kills: a controller that dies between record and pods leaves nothing to go on with. */
const MORE_RESTARTS_MAX = 8;
const why = whyNoControlPlane();

describe.skipIf(why !== undefined)(`crashes of the controller${why ? ` (skipped: ${why})` : ""}`, () => {
  let it: DisruptionBed;
  const written: string[] = [];
  /** Crash points that have not fired yet: "before POST pods". */
  const left = new Set<string>();
  let deaths = 0;
  let isMortal = false;
  let titleOf = titles();

  beforeAll(async () => {
    it = await DisruptionBed.start(6);
    startController();
    startController();
  }, BED_TIMEOUT_MS);
  afterEach(() => it.expectHeld());
  afterAll(async () => {
    await it?.stop();
  });

  function startController(): void {
    it.startController({ diesAt, die: startController });
  }

  function diesAt(step: Step): "before" | "after" | undefined {
    const title = titleOf(step);
    if (!isMortal && !written.includes(title)) written.push(title);
    if (!isMortal || deaths >= DEATHS_MAX) return undefined;
    const when = WHENS.find((each) => left.delete(`${each} ${title}`));
    if (when !== undefined) deaths += 1;
    return when;
  }

  const scale = async (replicas: number) => {
    const { code, stderr } = await it.bed.plane.kubectl(["scale", "mdep/nano", `--replicas=${replicas}`]);
    expect(code, stderr).toBe(0);
    const isSo = async () => {
      it.expectHeld();
      const groups = await groupsOf(it.bed, "nano");
      return groups.length === replicas && groups.every(({ status }) => status.phase === "Serving");
    };
    await until(isSo, `${replicas} replicas serve`, SERVE_MS_MAX).catch((error) => it.explain(error));
  };

  async function live(): Promise<void> {
    const { invariants } = it.witness;
    titleOf = titles();
    await it.bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
    const first = await it.serving();
    process.kill(it.pidOf(first, 1), "SIGKILL");
    await it.serving(first.status.incarnation);
    await scale(2);
    await scale(1);
    await it.bed.remove(`${OURS}/modeldeployments/nano`);
    await it.gone();
    it.expectHeld();
    expect(invariants.objects("pods")).toEqual([]);
  }

  test(
    "a life that nobody disturbs: what is written in it",
    async () => {
      it.witness.invariants.restartsMax = 1;
      const beganMs = performance.now();
      await live();
      const took = ((performance.now() - beganMs) / 1000).toFixed(1);
      process.stdout.write(`undisturbed: ${took} s, ${written.length} writes:\n${written.join("\n")}\n`);
      expect(written.length).toBeGreaterThan(10);
    },
    LIFE_MS_MAX,
  );

  test(
    "whoever dies at any of them is followed by one that comes to the same end",
    async () => {
      it.witness.invariants.restartsMax = 1 + MORE_RESTARTS_MAX;
      for (const title of written) for (const when of WHENS) left.add(`${when} ${title}`);
      isMortal = true;
      for (let lives = 1; left.size > 0 && lives <= LIVES_MAX; lives++) {
        const beganMs = performance.now();
        deaths = 0;
        await live();
        const took = ((performance.now() - beganMs) / 1000).toFixed(1);
        const { restartsSeen } = it.witness.invariants;
        process.stdout.write(
          `life ${lives}: ${took} s, ${deaths} controllers died, ${left.size} crash points left, at most ${restartsSeen} restarts\n`,
        );
      }
      expect([...left]).toEqual([]);
    },
    LIVES_MAX * LIFE_MS_MAX,
  );
});

/**
 * A crash point: every write of a kind; or every single write, of a status by what it changes: the record, or whether it serves.
 * Phases on the way there are one: how many of them are seen is the machine's.
 */
function titles(): (step: Step) => string {
  const records = new Map<string, number>();
  return ({ what, name, body }) => {
    if (!isLong) return what;
    if (!what.endsWith("/status")) return `${what} ${name}`;
    const { phase, record } = fieldsOf(fieldsOf(body).status);
    const { incarnation, begun } = fieldsOf(record);
    const at = 2 * Number(incarnation ?? 0) + (begun === true ? 1 : 0);
    // A write of the phase that came too late carries an older record, and is refused.
    const isRecord = at > (records.get(`${what} ${name}`) ?? 0);
    if (isRecord) records.set(`${what} ${name}`, at);
    const serves = phase === "Serving" ? "serves" : "does not serve";
    return `${what} ${name} ${isRecord ? `record ${incarnation}${begun === true ? " begun" : ""}` : serves}`;
  };
}
