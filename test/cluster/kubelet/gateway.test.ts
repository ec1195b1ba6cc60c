// The gateway on a real control plane: controller and gateway as processes, two replicas of one rank each. What a
// client gets is the golden text, whichever replica dies and whether there is an API server or not.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { chunksOf, openSse } from "../../controller/gateway/sse-client.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";
import { controllerSaid, installCrds, startController, startGateway } from "./controller.ts";
import { Group, goldenPrompts, nanoDeployment, SERVE_MS_MAX } from "./serving.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const HTTP_PORT = 8080;
const BACK_MS_MAX = 90_000;
const STEP_MS_MAX = SERVE_MS_MAX + BACK_MS_MAX + 60_000;
/** Seconds of work, so that it is under way when its replica dies: the kill comes with the first tokens. */
const LONG_TOKENS = 1_200;
const LONG_CHOICES = 16;
const why = whyNoControlPlane();

const DEPLOYMENT = nanoDeployment({ replicas: 2, gpu: { count: 1 } });

const Model = z.looseObject({
  muster: z.looseObject({
    replicas: z.number(),
    cause: z.string(),
    revision: z.string(),
    aliases: z.array(z.string()),
  }),
});
const sure = goldenPrompts();

describe.skipIf(why !== undefined)(`muster gateway on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;
  let url = "";

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "gpu-a", gpus: 1 },
        { name: "gpu-b", gpus: 1 },
        // A node that has failed a group twice is avoided: what is killed twice needs another.
        { name: "gpu-c", gpus: 1 },
      ],
    });
    await installCrds(bed);
    startController(bed);
    startGateway(bed, `127.0.0.1:${HTTP_PORT}`);
    url = `http://127.0.0.1:${(await bed.plane.space.forward("127.0.0.1", HTTP_PORT)).port}`;
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  const gatewaySaid = () => readFileSync(join(bed.plane.dir, "gateway.log"), "utf8").slice(-2_000);
  const statusOf = (path: string) =>
    fetch(url + path).then(
      ({ status }) => status,
      () => 0,
    );

  /** What the gateway knows of the model; undefined where it knows none. */
  async function model(): Promise<z.infer<typeof Model> | undefined> {
    const parsed = Model.safeParse(await (await fetch(`${url}/v1/models/default/nano`)).json());
    return parsed.success ? parsed.data : undefined;
  }

  async function replicas(count: number): Promise<void> {
    let last: Awaited<ReturnType<typeof model>>;
    const isSo = async () => {
      for (const id of ["controller", "gateway"]) if (!bed.plane.processes.isRunning(id)) throw new Error(`no ${id}`);
      last = await model();
      return last?.muster.replicas === count;
    };
    await until(isSo, `the gateway sees ${count} replicas`, SERVE_MS_MAX).catch((error) => {
      throw new Error(`${error.message}: ${JSON.stringify(last)}\n${gatewaySaid()}\n${controllerSaid(bed)}`);
    });
  }

  async function expectGolden(): Promise<void> {
    for (const { prompt, greedy, text } of sure) {
      const body = { model: "nano", prompt, max_tokens: greedy.length, temperature: 0, ignore_eos: true };
      const init = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
      const response = await fetch(`${url}/v1/completions`, init);
      expect(await response.json()).toMatchObject({ model: "nano", choices: [{ text }] });
    }
  }

  const long = {
    model: "nano",
    prompt: "My fellow citizens,",
    max_tokens: LONG_TOKENS,
    n: LONG_CHOICES,
    temperature: 0.7,
    seed: 11,
    ignore_eos: true,
    stream: true,
    stream_options: { include_usage: true },
    muster: { return_token_ids: true },
  };

  /** Choices that each replica has been given. */
  async function given(): Promise<Map<string, number>> {
    const text = await (await fetch(`${url}/metrics`)).text();
    const lines = text.matchAll(/^muster_gateway_replica_requests_total\{[^}]*replica="([^"]+)"[^}]*\} (\d+)/gm);
    return new Map([...lines].map(([, name = "", count]) => [name, Number(count)]));
  }

  /** Process id of a replica's only worker. */
  async function pidOf(name: string): Promise<number> {
    const { status } = Group.parse(await bed.plane.api.find(`${OURS}/replicagroups/${name}`));
    const [worker] = status.placement;
    return worker ? (bed.kubelet(worker.node).pids("default", worker.pod).get("worker") ?? 0) : 0;
  }

  /** By replica: process id of its only worker. Asked while there is an API server. */
  async function pids(): Promise<Map<string, number>> {
    const { items } = await bed.plane.api.list(`${OURS}/replicagroups`);
    const names = items.map(({ metadata }) => metadata.name);
    return new Map(await Promise.all(names.map(async (name): Promise<[string, number]> => [name, await pidOf(name)])));
  }

  /** The long answer undisturbed, and who could be killed when it comes again. */
  async function undisturbed() {
    const answer = await chunksOf(await openSse(url, "/v1/completions", long));
    expect(answer).toMatchObject({ isDone: true, error: undefined });
    expect(answer.ids).toHaveLength(LONG_TOKENS);
    expect(answer.texts).toHaveLength(LONG_CHOICES);
    expect(answer.usage.muster.resumes).toBeUndefined();
    return { answer, pids: await pids() };
  }

  /** The same answer; the replica that has most of its choices is killed as soon as all are placed. */
  async function expectSurvives({ answer, pids: known }: Awaited<ReturnType<typeof undisturbed>>) {
    const before = await given();
    const response = await openSse(url, "/v1/completions", long);
    let more: { name: string; count: number }[] = [];
    const isPlaced = async () => {
      more = [...(await given())].map(([name, count]) => ({ name, count: count - (before.get(name) ?? 0) }));
      return more.reduce((sum, { count }) => sum + count, 0) >= LONG_CHOICES;
    };
    await until(isPlaced, "all choices are placed");
    const replica = more.toSorted((one, other) => other.count - one.count)[0]?.name ?? "";
    const pid = known.get(replica) ?? 0;
    expect(pid).toBeGreaterThan(0);
    process.kill(pid, "SIGKILL");
    const got = await chunksOf(response);
    expect(got.error).toBeUndefined();
    expect(got.usage.muster.resumes).toBeGreaterThan(0);
    expect(got.usage.completion_tokens).toBe(LONG_TOKENS * LONG_CHOICES);
    expect({ ids: got.ids, texts: got.texts }).toEqual({ ids: answer.ids, texts: answer.texts });
    return { replica, pid };
  }

  test(
    "ready without a model; a deployment is served as soon as it is there, and its first request waits for it",
    async () => {
      await until(async () => (await statusOf("/readyz")) === 200, "the gateway is ready", SERVE_MS_MAX).catch(
        (error) => {
          throw new Error(`${error.message}\n${gatewaySaid()}`);
        },
      );
      await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
      await until(async () => (await model()) !== undefined, "the gateway knows the deployment");
      expect((await model())?.muster.replicas).toBe(0);
      const body = { ...long, max_tokens: 8, n: 1 };
      const early = await openSse(url, "/v1/completions", body);
      const got = await chunksOf(early);
      expect(got).toMatchObject({ isDone: true, error: undefined });
      expect(got.ids).toHaveLength(8);
      await replicas(2);
      expect((await model())?.muster.aliases).toEqual(["default/nano"]);
      await expectGolden();
    },
    STEP_MS_MAX,
  );

  test(
    "kill -9 of the replica that serves a stream: the other one goes on with it, token for token",
    async () => {
      const killed = await expectSurvives(await undisturbed());
      await expectGolden();
      await replicas(2);
      expect(await pidOf(killed.replica)).not.toBe(killed.pid);
    },
    STEP_MS_MAX,
  );

  test(
    "without an API server requests go on, over the death of a replica too; when it is back the view is",
    async () => {
      const before = await undisturbed();
      await bed.plane.killApiServer();
      await expectGolden();
      const killed = await expectSurvives(before);
      await expectGolden();
      expect(await statusOf("/readyz")).toBe(200);
      await bed.plane.restartApiServer();
      let seen: unknown;
      const isBack = async () => {
        // A server that has just come up may leave a question unanswered.
        seen = await pidOf(killed.replica).catch((error: unknown) => error);
        return typeof seen === "number" && ![0, killed.pid].includes(seen);
      };
      await until(isBack, "the controller has replaced the replica", BACK_MS_MAX).catch((error) => {
        throw new Error(`${error.message}; ${killed.pid} -> ${seen}\n${gatewaySaid()}\n${controllerSaid(bed)}`);
      });
      await replicas(2);
      await expectGolden();
    },
    STEP_MS_MAX,
  );
});
