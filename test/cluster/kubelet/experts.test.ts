// Experts that move by load on a real control plane: the controller looks, two workers stage, the leader switches, under streams
// through a gateway. What was begun before goes on token for token; what is said of it is compared in all places.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { chunksOf, openSse } from "../../controller/gateway/sse-client.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";
import { controllerSaid, installCrds, startController, startGateway } from "./controller.ts";
import { expectGolden, type Group, goldenPrompts, greedyOf, groupOnce, SERVE_MS_MAX } from "./serving.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const EVENTS = "/apis/events.k8s.io/v1/namespaces/default/events";
const GATEWAY_PORT = 8080;
const CONTROLLER_PORT = 7443;
const FLAGS = {
  listen: "127.0.0.1:7441",
  advertise: "127.0.0.1",
  http: `127.0.0.1:${CONTROLLER_PORT}`,
  "expert-look-seconds": "1",
};
const STEP_MS_MAX = 2 * SERVE_MS_MAX + 60_000;
const MOVE_MS_MAX = 120_000;
/** Far less than what makes a window of load: nothing has moved when the reference is taken. */
const TOKENS = 1_200;
/** Where the two best logits are nearer than that, sums in another order may choose the other. */
const GAP_MIN = 1e-4;
const why = whyNoControlPlane();

const DEPLOYMENT = {
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "nano" },
  spec: {
    model: { source: "builtin://nano-maverick" },
    gpu: { count: 2, topology: { nodes: 2 } },
    parallelism: { tp: 2, ep: 2 },
    experts: { balancing: "measured", redundant: 2 },
    slo: { concurrency: 32 },
    rollout: { drainTimeout: "5s" },
  },
};

const Plan = z.looseObject({
  spec: z.looseObject({ expertCopies: z.number(), revision: z.string() }),
  status: z
    .looseObject({
      expertMaps: z
        .array(z.object({ group: z.string(), incarnation: z.number(), version: z.number(), digest: z.string() }))
        .max(1)
        .optional(),
      measured: z
        .looseObject({
          tokensPerSecond: z.number(),
          concurrency: z.number(),
          ttftMs: z.number().default(0),
          itlMs: z.number().default(0),
        })
        .optional(),
    })
    .default({}),
});
const Numbers = z.looseObject({
  status: z.looseObject({ numericsId: z.string(), incarnation: z.number(), restarts: z.number() }),
});
const Event = z.looseObject({
  reason: z.string(),
  note: z.string().default(""),
  regarding: z.looseObject({ kind: z.string(), name: z.string() }),
});

describe.skipIf(why !== undefined)(`experts on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;
  let url = "";
  /** Greedy tokens of one prompt before anything has moved, up to where another order of sums may change them. */
  let reference: number[] = [];

  beforeAll(async () => {
    const nodes = ["gpu-a", "gpu-b", "gpu-c"].map((name) => ({ name, gpus: 1 }));
    bed = await Bed.start({ nodes });
    await installCrds(bed);
    startController(bed, FLAGS);
    startGateway(bed, `127.0.0.1:${GATEWAY_PORT}`, ["--reports", FLAGS.listen]);
    url = `http://127.0.0.1:${(await bed.plane.space.forward("127.0.0.1", GATEWAY_PORT)).port}`;
    await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  async function plan() {
    const [found, ...others] = (await bed.plane.api.list(`${OURS}/shardplans`)).items;
    expect(others).toEqual([]);
    return Plan.parse(found);
  }

  /** Of the only group. */
  const expertMap = async () => (await plan()).status.expertMaps?.[0];

  const numbersOf = async ({ metadata }: Group) =>
    Numbers.parse(await bed.plane.api.find(`${OURS}/replicagroups/${metadata.name}`)).status;

  async function metric(port: number, name: string): Promise<number> {
    const target = { address: "127.0.0.1", port, path: "/metrics" };
    const { body } = await bed.plane.space.get(target, AbortSignal.timeout(10_000));
    const line = body.split("\n").find((each) => each.startsWith(name));
    return Number(line?.split(" ").at(-1) ?? 0);
  }

  const servingSince = (incarnation: number): Promise<Group> =>
    groupOnce(bed, "nano", {
      what: `serves in incarnation ${incarnation}`,
      isSo: ({ status }) => status.phase === "Serving" && status.incarnation === incarnation,
    });

  /** Once the gateway has it too. */
  async function asked(group: Group): Promise<void> {
    const isKnown = async () => {
      const answer = await (await fetch(`${url}/v1/models/nano`)).json().catch(() => undefined);
      return (
        Number(
          z.looseObject({ muster: z.looseObject({ replicas: z.number() }) }).safeParse(answer).data?.muster.replicas,
        ) > 0
      );
    };
    await until(isKnown, `the gateway knows ${group.metadata.name}`, SERVE_MS_MAX);
  }

  const bodyOf = (prompt: string, more: object) => ({
    model: "nano",
    prompt,
    max_tokens: TOKENS,
    ignore_eos: true,
    stream: true,
    stream_options: { include_usage: true },
    muster: { return_token_ids: true },
    ...more,
  });

  const answer = async (body: object) => {
    const got = await chunksOf(await openSse(url, "/v1/completions", body));
    expect(got).toMatchObject({ isDone: true, error: undefined });
    return got;
  };

  const sample = (seed: number) =>
    answer(bodyOf("My fellow citizens,", { temperature: 0.9, seed, n: 8, max_tokens: 400 }));

  /**
   * Streams that are compared, beside others that make load, until a map is in use. Two at a time, the one half a stream behind
   * the other: one always runs.
   */
  async function movedUnderStreams(): Promise<boolean[]> {
    const [first] = goldenPrompts();
    if (first === undefined) throw new Error("no prompt");
    const changes: boolean[] = [];
    let isMoved = false;
    const watched = async (tokens: number) => {
      for (let length = tokens; !isMoved; length = TOKENS) {
        const { ids, usage } = await answer(bodyOf(first.prompt, { temperature: 0, max_tokens: length }));
        expect(ids.slice(0, reference.length)).toEqual(reference.slice(0, length));
        changes.push(usage.muster.numerics_changed ?? false);
        expect(usage.muster.resumes).toBeUndefined();
      }
    };
    const load = async (seed: number) => {
      while (!isMoved) await sample(seed);
    };
    const looking = until(async () => ((await expertMap())?.version ?? 0) > 0, "experts move", MOVE_MS_MAX)
      .catch(async (error) => {
        throw new Error(`${error.message}: ${JSON.stringify((await plan()).status)}\n${controllerSaid(bed)}`);
      })
      .finally(() => {
        isMoved = true;
      });
    await Promise.all([watched(TOKENS), watched(TOKENS / 2), load(1), load(2), looking]);
    return changes;
  }

  const failures = () => metric(CONTROLLER_PORT, 'muster_expert_moves_total{outcome="failed"}');
  /** What all places say of the map in use. */
  async function expectSaid(group: Group, base: string, before = 0): Promise<void> {
    const map = await expertMap();
    expect(map).toMatchObject({ group: group.metadata.name, incarnation: group.status.incarnation });
    let numericsId = "";
    const isSaid = async () => {
      ({ numericsId } = await numbersOf(group));
      return numericsId !== base;
    };
    await until(isSaid, "the group says its numerics id", 60_000);
    expect(numericsId).toBe(`${base}-x${map?.digest}`);
    const note = `map ${map?.version}: `;
    const isTold = async () => {
      const events = (await bed.plane.api.list(EVENTS)).items.map((item) => Event.parse(item));
      const own = events.filter(({ reason, note: said }) => reason === "ExpertsMoved" && said.startsWith(note));
      return own.some(({ regarding: { kind, name } }) => kind === "ReplicaGroup" && name === group.metadata.name);
    };
    await until(isTold, "the event is there", 60_000);
    const failed = (await failures()) - before;
    expect({ failed, said: failed > 0 ? controllerSaid(bed) : "" }).toEqual({ failed: 0, said: "" });
  }

  test(
    "copies come and a stream goes on over the switch, token for token; status, event and metrics say so",
    async () => {
      const group = await servingSince(1);
      await asked(group);
      const { spec } = await plan();
      expect(spec.expertCopies).toBe(2);
      await until(async () => (await expertMap())?.version === 0, "the plan's own map is said", 60_000);
      const { numericsId: base } = await numbersOf(group);
      const [first] = goldenPrompts();
      const { tokens, gaps } = await greedyOf(bed, group, { ids: first?.prompt_ids ?? [], maxTokens: TOKENS });
      const tie = gaps.findIndex((gap) => gap < GAP_MIN);
      reference = tokens.slice(0, tie < 0 ? tokens.length : tie);
      process.stdout.write(`${reference.length} of ${TOKENS} tokens are compared\n`);
      expect(reference.length).toBeGreaterThan(TOKENS / 4);
      expect((await expertMap())?.version).toBe(0);

      const changes = await movedUnderStreams();
      expect(changes).toContain(true);
      expect(await metric(GATEWAY_PORT, "muster_gateway_numerics_changes_total")).toBeGreaterThan(0);
      expect(await metric(CONTROLLER_PORT, 'muster_expert_moves_total{outcome="moved"}')).toBeGreaterThan(0);
      await expectSaid(group, base);
      await expectGolden(bed, group);
      expect(await numbersOf(group)).toMatchObject({ incarnation: 1, restarts: 0 });
      expect((await plan()).spec.revision).toBe(spec.revision);
    },
    STEP_MS_MAX,
  );

  test(
    "what clients see at the gateway comes into the plan's status beside what the group gives, and plans nothing anew",
    async () => {
      const before = await plan();
      const isTold = async () => {
        const { measured } = (await plan()).status;
        return (measured?.ttftMs ?? 0) > 0 && (measured?.itlMs ?? 0) > 0;
      };
      let isDone = false;
      const load = async (seed: number) => {
        while (!isDone) await sample(seed);
      };
      const looking = until(isTold, "latencies are said", MOVE_MS_MAX)
        .catch(async (error) => {
          throw new Error(`${error.message}: ${JSON.stringify((await plan()).status)}\n${controllerSaid(bed)}`);
        })
        .finally(() => {
          isDone = true;
        });
      await Promise.all([load(1), load(2), looking]);
      const { spec, status } = await plan();
      process.stdout.write(`measured: ${JSON.stringify(status.measured)}\n`);
      expect(status.measured?.tokensPerSecond).toBeGreaterThan(0);
      expect(status.measured?.concurrency).toBeGreaterThan(1);
      expect(status.expertMaps).toHaveLength(1);
      expect(spec).toEqual(before.spec);
      expect(await numbersOf(await servingSince(1))).toMatchObject({ incarnation: 1, restarts: 0 });
    },
    STEP_MS_MAX,
  );

  test(
    "kill -9 of a worker: the next incarnation begins with the plan's map, and moves again",
    async () => {
      const before = await servingSince(1);
      const seat = before.status.placement.find(({ worker }) => worker === 1);
      const pid = seat === undefined ? undefined : bed.kubelet(seat.node).pids("default", seat.pod).get("worker");
      if (pid === undefined) throw new Error("worker 1 does not run");
      process.kill(pid, "SIGKILL");
      const group = await servingSince(2);
      await until(async () => (await expertMap())?.version === 0, "the plan's own map is said", 60_000);
      // A look at a leader that was just dying has failed, or has not.
      const failed = await failures();
      const { numericsId: base } = await numbersOf(group);
      expect(base).not.toMatch(/-x[0-9a-f]{12}$/);
      await expectGolden(bed, group);
      expect(await movedUnderStreams()).not.toEqual([]);
      await expectSaid(group, base, failed);
      await expectGolden(bed, group);
      expect(await numbersOf(group)).toMatchObject({ incarnation: 2, restarts: 1 });
    },
    STEP_MS_MAX,
  );
});
