// A bed for rolling updates: two nodes of two GPUs, a gateway, a server of slow weights, one deployment of two replicas; traffic
// over all of it, and what each of two checkpoints answers. Owns what is started, how a rollout is watched and how traffic is
// judged; what is changed is the tests'.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect } from "vitest";
import { z } from "zod";
import { until } from "../../until.ts";
import { Bed, POD_PATH } from "./bed.ts";
import { MODEL, makeOther, Reference } from "./checkpoints.ts";
import { controllerSaid, installCrds, startController, startGateway } from "./controller.ts";
import { goldenPrompts, SERVE_MS_MAX } from "./serving.ts";
import { type Answer, askOnce, type Expected, faultOf, type Question, Traffic } from "./traffic.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const LEASE = "/apis/coordination.k8s.io/v1/namespaces/default/leases/muster-controller";
const GATEWAY_PORT = 8080;
const HOST_PORT = 8090;
export const FIRST = "builtin://nano-maverick";
export const OTHER = `http://127.0.0.1:${HOST_PORT}/other/`;
export const IMAGE = "muster/worker:test";
export const REPLICAS = 2;
export const LONG_TOKENS = 1_900;
const isLong = process.env.MUSTER_TEST_LONG === "1";
/** Of 12 MB of weights. */
const BYTES_PER_SECOND = isLong ? 500_000 : 4_000_000;
const SHORT_CLIENTS = isLong ? 12 : 4;
const LONG_CLIENTS = isLong ? 4 : 2;
const FINGERPRINT_DIGITS = 12;

const DEPLOYMENT = {
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "nano" },
  spec: {
    model: { source: FIRST },
    replicas: REPLICAS,
    gpu: { count: 1 },
    slo: { concurrency: 48 },
    rollout: { kind: "surge", drainTimeout: "300s" },
  },
};

const prompts = goldenPrompts();
export const shorts: Question[] = prompts.flatMap(({ prompt_ids: prompt }, index) => [
  { name: `greedy ${index}`, prompt, body: { temperature: 0, max_tokens: 24, sure: true } },
  { name: `sampled ${index}`, prompt, body: { temperature: 0.8, top_p: 0.95, seed: 40 + index, n: 2, max_tokens: 24 } },
]);
export const long: Question = {
  name: "long",
  prompt: prompts[0]?.prompt_ids ?? [],
  copies: isLong ? 4 : 1,
  body: { temperature: 0.7, seed: 11, n: 8, max_tokens: LONG_TOKENS },
};
const all = [...shorts, long];

const Group = z.looseObject({
  metadata: z.looseObject({ name: z.string(), uid: z.string() }),
  spec: z.looseObject({ plan: z.string(), state: z.string() }),
  status: z
    .looseObject({
      phase: z.string().optional(),
      restarts: z.number().default(0),
      cause: z.looseObject({ message: z.string(), bytesLoaded: z.number().optional() }).optional(),
    })
    .default({ restarts: 0 }),
});
type Group = z.infer<typeof Group>;
const Plan = z.looseObject({
  metadata: z.looseObject({ name: z.string(), uid: z.string() }),
  spec: z.looseObject({ revision: z.string(), image: z.string(), model: z.looseObject({ source: z.string() }) }),
});
const Deployment = z.looseObject({
  metadata: z.looseObject({ generation: z.number() }),
  status: z
    .looseObject({
      phase: z.string().optional(),
      observedGeneration: z.number().optional(),
      updated: z.string().optional(),
      conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })).default([]),
      notices: z.array(z.looseObject({ message: z.string() })).default([]),
    })
    .default({ conditions: [], notices: [] }),
});
const Pod = z.looseObject({
  metadata: z.looseObject({ name: z.string(), uid: z.string() }),
  spec: z.looseObject({ containers: z.array(z.looseObject({ image: z.string() })) }),
});
const ModelSeen = z.looseObject({ muster: z.looseObject({ replicas: z.number() }) });
const Lease = z.looseObject({ spec: z.looseObject({ holderIdentity: z.string().optional() }) });

/** On performance.now's clock: the patch, the first replica of the new revision, the end of the last old one. */
export type Window = { patchedMs: number; servedMs: number; overMs: number };

export class RolloutBed {
  readonly bed: Bed;
  readonly #folder: string;
  #url = "";
  #bySource: ReadonlyMap<string, Expected> = new Map();
  /** Controllers that are to run. */
  readonly #controllers = new Set<string>();
  #traffic: Traffic | undefined;

  private constructor(bed: Bed, folder: string) {
    this.bed = bed;
    this.#folder = folder;
  }

  /** Resolves when the gateway has the first checkpoint's answer from a deployment all of whose replicas serve. */
  static async start(): Promise<RolloutBed> {
    const folder = mkdtempSync(join(tmpdir(), "muster-other-"));
    makeOther(folder);
    const nodes = ["gpu-a", "gpu-b"].map((name) => ({ name, gpus: 2 }));
    const made = new RolloutBed(await Bed.start({ nodes }), folder);
    await made.#begin().catch(async (error) => {
      await made.stop();
      throw error;
    });
    return made;
  }

  async #begin(): Promise<void> {
    const { plane } = this.bed;
    await installCrds(this.bed);
    plane.processes.spawn({
      id: "host",
      ...plane.space.inside(process.execPath, [
        join(import.meta.dirname, "file-host.mjs"),
        ...[String(HOST_PORT), this.#folder],
      ]),
      env: { PATH: process.env.PATH ?? "" },
      log: join(plane.dir, "host.log"),
      watchesStdin: false,
    });
    const pace = { address: "127.0.0.1", port: HOST_PORT, path: `/pace?bytes=${BYTES_PER_SECOND}` };
    const isPaced = () =>
      plane.space.get(pace, AbortSignal.timeout(5_000)).then(
        () => true,
        () => false,
      );
    await until(isPaced, "the file server answers");
    this.control("controller", IMAGE);
    startGateway(this.bed, `127.0.0.1:${GATEWAY_PORT}`);
    this.#url = `http://127.0.0.1:${(await plane.space.forward("127.0.0.1", GATEWAY_PORT)).port}`;
    await this.bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
    this.#bySource = await expectations(this.#folder);
    await this.when("both replicas of the first checkpoint serve", () => this.isOver(FIRST, REPLICAS));
    const isServed = async () => (await this.ask(long)).failure === undefined;
    await this.when("the gateway serves", isServed);
  }

  async stop(): Promise<void> {
    await this.#traffic?.stop();
    await this.bed.stop();
    rmSync(this.#folder, { recursive: true });
  }

  // ---- what is there ----

  async #listed<T>(path: string, schema: z.ZodType<T>): Promise<T[]> {
    return (await this.bed.plane.api.list(path)).items.map((item) => schema.parse(item));
  }

  readonly groups = () => this.#listed(`${OURS}/replicagroups`, Group);
  readonly plans = () => this.#listed(`${OURS}/shardplans`, Plan);
  readonly deployment = async () => Deployment.parse(await this.bed.plane.api.find(`${OURS}/modeldeployments/nano`));
  readonly leader = async () => Lease.parse(await this.bed.plane.api.find(LEASE)).spec.holderIdentity ?? "";

  /** Of workers. */
  async pods(): Promise<z.infer<typeof Pod>[]> {
    return (await this.#listed(POD_PATH, Pod)).filter(({ metadata }) => metadata.name.startsWith("nano-"));
  }

  async planOf(source: string): Promise<z.infer<typeof Plan> | undefined> {
    return (await this.plans()).find(({ spec }) => spec.model.source === source);
  }

  /** Replicas that take new requests, as the gateway knows them. */
  async taking(): Promise<number> {
    const answer = await fetch(`${this.#url}/v1/models/nano`);
    return ModelSeen.parse(await answer.json()).muster.replicas;
  }

  /** By which answers of the source's plan are known. */
  async fingerprint(source: string): Promise<string> {
    return (await this.planOf(source))?.spec.revision.slice(0, FINGERPRINT_DIGITS) ?? "";
  }

  /** Nothing but `count` serving groups of the source is left, and status says so. */
  async isOver(source: string, count: number): Promise<boolean> {
    const [plan, left, { metadata, status }] = [
      await this.planOf(source),
      await this.groups(),
      await this.deployment(),
    ];
    const isNew = ({ spec, status: { phase } }: Group) => spec.plan === plan?.metadata.name && phase === "Serving";
    const isSaid = status.observedGeneration === metadata.generation && status.phase === "Serving";
    return left.length === count && left.every(isNew) && isSaid && (await this.pods()).length === count;
  }

  // ---- what is done ----

  control(id: string, image: string): void {
    this.#controllers.add(id);
    startController(this.bed, { "worker-image": image, "lease-seconds": "5" }, { id });
  }

  /** Resolves when the process has ended; `isKilled`: as by kill -9. */
  async end(id: string, isKilled: boolean): Promise<void> {
    const { processes } = this.bed.plane;
    this.#controllers.delete(id);
    if (isKilled) processes.kill(id);
    else processes.stop(id, 30_000);
    await processes.ended(id, AbortSignal.timeout(60_000));
  }

  /** Resolves with the time of it. */
  async patch(spec: object): Promise<number> {
    const args = ["patch", "mdep", "nano", "--type=merge", "-p", JSON.stringify({ spec })];
    const { code, stderr } = await this.bed.plane.kubectl(args);
    expect(code, stderr).toBe(0);
    return performance.now();
  }

  /** Resolves when `isSo`, with the time; what there was instead is in the error. */
  async when(what: string, isSo: () => Promise<boolean>): Promise<number> {
    const look = async () => {
      for (const id of [...this.#controllers, "gateway"]) {
        if (!this.bed.plane.processes.isRunning(id)) throw new Error(`${id} has ended before ${what}`);
      }
      return await isSo();
    };
    await until(look, what, SERVE_MS_MAX).catch(async (error) => {
      const seen = JSON.stringify([(await this.deployment()).status, await this.groups()]);
      const logs = [...this.#controllers, "gateway"].map((id) => `${id}: ${controllerSaid(this.bed, id)}`);
      throw new Error(`${error.message}; ${seen}\n${logs.join("\n")}`, { cause: error });
    });
    return performance.now();
  }

  /** Looks until the rollout is over: at no look do fewer than the wanted replicas serve, or more than one too many exist. */
  async surge(source: string): Promise<{ servedMs: number; overMs: number; pulledBytes: number }> {
    let [servedMs, looks, pulledBytes] = [0, 0, 0];
    const overMs = await this.when(`the rollout to ${source} is over`, async () => {
      const [seen, plan] = [await this.groups(), await this.planOf(source)];
      const serving = seen.filter(({ spec, status }) => spec.state === "Serving" && status.phase === "Serving");
      expect(serving.length, JSON.stringify(seen)).toBeGreaterThanOrEqual(REPLICAS);
      expect(seen.length, JSON.stringify(seen)).toBeLessThanOrEqual(REPLICAS + 1);
      const isNew = ({ spec }: Group) => spec.plan === plan?.metadata.name;
      if (servedMs === 0 && serving.some(isNew)) servedMs = performance.now();
      for (const { status } of seen.filter(isNew)) {
        if (status.phase === "Pulling") pulledBytes = Math.max(pulledBytes, status.cause?.bytesLoaded ?? 0);
      }
      looks += 1;
      return await this.isOver(source, REPLICAS);
    });
    expect(looks).toBeGreaterThan(5);
    return { servedMs, overMs, pulledBytes };
  }

  // ---- what clients see ----

  async ask(question: Question, onBegun?: () => void): Promise<Answer> {
    return await askOnce(this.#url, question, onBegun === undefined ? {} : { onBegun });
  }

  /** Traffic of everything, once each short question has been answered and long streams are under way. */
  async traffic(): Promise<Traffic> {
    await this.#traffic?.stop();
    const made = new Traffic(this.#url);
    this.#traffic = made;
    for (let client = 0; client < SHORT_CLIENTS; client++) {
      const first = client % shorts.length;
      made.add([...shorts.slice(first), ...shorts.slice(0, first)]);
    }
    for (let client = 0; client < LONG_CLIENTS; client++) made.add([long]);
    await made.answered(shorts, 0, SERVE_MS_MAX);
    await until(() => made.running(long.name) === LONG_CLIENTS, "long streams are under way", SERVE_MS_MAX);
    return made;
  }

  /** Answers that are not whole, not right or of several revisions. */
  async faults(answers: readonly Answer[]): Promise<string[]> {
    const known = await this.expected();
    return answers.flatMap((answer) => faultOf(answer, known) ?? []);
  }

  /** By fingerprint. */
  async expected(): Promise<Map<string, Expected>> {
    const known = new Map<string, Expected>();
    for (const { spec } of await this.plans()) {
      const answers = this.#bySource.get(spec.model.source);
      if (answers !== undefined) known.set(spec.revision.slice(0, FINGERPRINT_DIGITS), answers);
    }
    return known;
  }

  /** Ends the traffic and judges it: none failed, wrong or mixed; both revisions seen, outside of the window only one. */
  async judge(run: Traffic, [from, to]: [string, string], { patchedMs, servedMs, overMs }: Window): Promise<void> {
    await run.answered(shorts, overMs, SERVE_MS_MAX);
    await run.stop();
    const { answers } = run;
    expect(await this.faults(answers)).toEqual([]);
    const [old, next] = [await this.fingerprint(from), await this.fingerprint(to)];
    expect(old).not.toBe(next);
    // The control: taken for the other revision's, every one of them is wrong.
    const known = await this.expected();
    const exchanged = new Map([old, next].map((name) => [name, known.get(name === old ? next : old) ?? new Map()]));
    expect(answers.filter((one) => faultOf(one, exchanged) === undefined)).toEqual([]);
    for (const { name } of all) {
      const mine = answers.filter(({ question }) => question.name === name);
      expect(new Set(mine.flatMap(({ fingerprints }) => [...fingerprints])), name).toEqual(new Set([old, next]));
    }
    expect(answers.filter((one) => one.beganMs >= overMs && !one.fingerprints.has(next))).toEqual([]);
    expect(answers.filter((one) => one.endedMs < patchedMs && !one.fingerprints.has(old))).toEqual([]);
    const isOver = (one: Answer) => one.beganMs < servedMs && one.endedMs > servedMs && one.fingerprints.has(old);
    const over = answers.filter((one) => one.question === long && isOver(one));
    expect(over.length).toBeGreaterThan(0);
    const whole = over.filter(({ beganMs }) => beganMs < patchedMs).length;
    const seconds = (ms: number) => `${((ms - patchedMs) / 1000).toFixed(1)} s`;
    const streams = `${over.length} long streams of the old revision ran over the switch, ${whole} from before the update`;
    const times = `first new replica after ${seconds(servedMs)}, over after ${seconds(overMs)}`;
    console.log(`${answers.length} answers, none failed, wrong or mixed; ${streams}; ${times}`);
  }
}

/** What each of the two answers to every question, by source. */
async function expectations(folder: string): Promise<Map<string, Expected>> {
  const made = new Map<string, Expected>();
  for (const [source, at] of [[FIRST, MODEL] as const, [OTHER, folder] as const]) {
    const reference = await Reference.open(at);
    const expected = new Map<string, number[][]>();
    for (const question of all) {
      const ids = await reference.answer(question);
      if (ids === undefined) throw new Error(`${question.name} of ${source} is too close to call: ask another prompt`);
      expected.set(question.name, ids);
    }
    await reference.close();
    made.set(source, expected);
  }
  const first = (source: string, name: string) => made.get(source)?.get(name)?.[0] ?? [];
  for (const [index, { greedy }] of prompts.entries()) {
    expect(first(FIRST, `greedy ${index}`)).toEqual(greedy.slice(0, 24));
  }
  for (const { name } of all) expect(first(FIRST, name).slice(0, 8)).not.toEqual(first(OTHER, name).slice(0, 8));
  return made;
}
