// Every field of a ModelDeployment and of a DraftPool on a real API server: two values make two differences, in the plan, the
// pods, the groups or the status. Pods are made and opened, and none runs: each asks for something that no node has.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { draftPoolSpec } from "../../../controller/api/draft-pool.ts";
import { LABELS } from "../../../controller/api/meta.ts";
import { toStructural } from "../../../controller/api/structural.ts";
import { fieldPaths } from "../../controller/api/leaves.ts";
import {
  DRAFT,
  NANO,
  ON_SERVER,
  POOL_FIXED,
  poolEffect,
  type Seen,
  type Spec,
} from "../../controller/kube/field-effects.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed, POD_PATH } from "./bed.ts";
import { controllerSaid, installCrds, startController, workerTemplate } from "./controller.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const SEEN_MS_MAX = 180_000;
const why = whyNoControlPlane();

const KINDS = { ModelDeployment: "modeldeployments", DraftPool: "draftpools" } as const;
type Kind = keyof typeof KINDS;

const Thing = z.looseObject({
  metadata: z.looseObject({
    name: z.string(),
    labels: z.record(z.string(), z.string()).default({}),
    ownerReferences: z.array(z.object({ kind: z.string(), name: z.string() })).default([]),
  }),
  spec: z.unknown().optional(),
  status: z.unknown().optional(),
});
type Thing = z.infer<typeof Thing>;
type Everything = Record<"modeldeployments" | "draftpools" | "shardplans" | "replicagroups" | "pods", Thing[]>;

/** Owners by what they ask for: fields that share a spec share an owner. */
const names = new Map<string, { name: string; kind: Kind; spec: Spec }>();
function ownerOf(kind: Kind, spec: Spec): string {
  const key = JSON.stringify([kind, spec]);
  const known = names.get(key) ?? { name: `f${names.size}`, kind, spec };
  names.set(key, known);
  return known.name;
}

type Row = { field: string; kind: Kind; one: string; other: string };
const rowsOf = (kind: Kind, fields: readonly string[]): Row[] =>
  fields.map((field) => {
    const effect = kind === "DraftPool" ? poolEffect(field) : ON_SERVER[field];
    if (effect === undefined) throw new Error(`${kind} ${field} has no effect`);
    const [one, other] = effect.cases.map(([spec]) => ownerOf(kind, spec));
    return { field, kind, one: one ?? "", other: other ?? "" };
  });
const poolFields = fieldPaths(toStructural(draftPoolSpec)).filter((path) => !POOL_FIXED.includes(path));
const ROWS = [...rowsOf("ModelDeployment", Object.keys(ON_SERVER)), ...rowsOf("DraftPool", poolFields)];

describe.skipIf(why !== undefined)(`fields on a real API server${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    const node = (name: string, product: string, labels: Record<string, string>) => ({
      name,
      gpus: 256,
      labels: { "nvidia.com/gpu.product": product, ...labels },
    });
    const zone = "topology.kubernetes.io/zone";
    bed = await Bed.start({
      nodes: [
        node("h200-a", "NVIDIA-H200", { [zone]: "a", pool: "one" }),
        node("h200-b", "NVIDIA-H200", { [zone]: "b", pool: "two" }),
        node("h100", "NVIDIA-H100-80GB-HBM3", { [zone]: "c" }),
        node("l40s", "NVIDIA-L40S", { [zone]: "d" }),
      ],
    });
    await installCrds(bed);
    const nobody = { "example.com/nobody": 1 };
    const template = workerTemplate(bed, { resources: { requests: nobody, limits: nobody } });
    const heard = { listen: "127.0.0.1:7441", advertise: "127.0.0.1", "nats-url": "nats://127.0.0.1:4222" };
    startController(bed, { ...heard, "worker-template": template }, { env: { MUSTER_NATS_TOKEN: "nobody" } });
    const high = { metadata: { name: "high" }, value: 10, preemptionPolicy: "Never" };
    await bed.make("/apis/scheduling.k8s.io/v1/priorityclasses", high);
    const make = async (kind: Kind, name: string, spec: Spec) => {
      await bed.make(`${OURS}/${KINDS[kind]}`, { apiVersion: "muster.dev/v1alpha1", kind, metadata: { name }, spec });
    };
    await make("DraftPool", "drafts", { model: { source: DRAFT }, gpu: { count: 1 } });
    // Groups are told of a pool when they are made: not before its vocabulary is known.
    const isKnown = async () =>
      Object(Thing.parse(await bed.plane.api.find(`${OURS}/draftpools/drafts`)).status).vocabulary;
    await until(async () => Boolean(await isKnown()), "the pool's vocabulary is known", SEEN_MS_MAX);
    for (const { kind, name, spec } of names.values()) await make(kind, name, spec);
  }, BED_TIMEOUT_MS + SEEN_MS_MAX);
  afterAll(async () => {
    await bed?.stop();
  });

  async function everything(): Promise<Everything> {
    if (!bed.plane.processes.isRunning("controller"))
      throw new Error(`the controller has ended: ${controllerSaid(bed)}`);
    const list = async (path: string) => (await bed.plane.api.list(path)).items.map((item) => Thing.parse(item));
    const kinds = ["modeldeployments", "draftpools", "shardplans", "replicagroups"] as const;
    const [modeldeployments, draftpools, shardplans, replicagroups] = await Promise.all(
      kinds.map((kind) => list(`${OURS}/${kind}`)),
    );
    const pods = await list(POD_PATH);
    return {
      modeldeployments: modeldeployments ?? [],
      draftpools: draftpools ?? [],
      shardplans: shardplans ?? [],
      replicagroups: replicagroups ?? [],
      pods,
    };
  }

  function seenOf(all: Everything, kind: Kind, name: string): Seen {
    const isIts = ({ metadata }: Thing) =>
      metadata.ownerReferences.some((owner) => owner.kind === kind && owner.name === name);
    const label = kind === "DraftPool" ? LABELS.pool : LABELS.deployment;
    const pods = all.pods.filter(({ metadata }) => metadata.labels[label] === name);
    const isInspector = ({ metadata }: Thing) => metadata.labels["app.kubernetes.io/component"] === "inspect";
    return {
      status: all[KINDS[kind]].find(({ metadata }) => metadata.name === name)?.status,
      plan: all.shardplans.find(isIts)?.spec,
      groups: all.replicagroups.filter(isIts),
      pods: pods.filter((pod) => !isInspector(pod)),
      inspectors: pods.filter(isInspector),
    };
  }

  test.each(ROWS)(
    "$kind: $field shows",
    async ({ field, kind, one, other }) => {
      const effect = kind === "DraftPool" ? poolEffect(field) : ON_SERVER[field];
      const [first, second] = effect?.cases ?? [];
      const wanted = [first?.[1], second?.[1]];
      expect(wanted[0]).not.toEqual(wanted[1]);
      let seen: unknown[] = [];
      let last: Seen[] = [];
      const isSo = async () => {
        const all = await everything();
        last = [one, other].map((name) => seenOf(all, kind, name));
        seen = last.map((each) => effect?.look(each));
        return JSON.stringify(seen) === JSON.stringify(wanted);
      };
      await until(isSo, `${field} shows`, SEEN_MS_MAX).catch((error) => {
        const statuses = last.map(({ status, groups }) => [status, ...groups.map((group) => Object(group).status)]);
        throw new Error(
          `${error.message}: ${JSON.stringify(seen)}, not ${JSON.stringify(wanted)}; ${JSON.stringify(statuses)}\n${controllerSaid(bed)}`,
        );
      });
    },
    SEEN_MS_MAX + 60_000,
  );

  test(
    "a podPatch that the server refuses is said in status before anything is made, with the server's words; mended, it goes on",
    async () => {
      const name = "refused";
      const specOf = (priorityClassName: string): Spec => ({
        model: { source: NANO },
        gpu: { count: 1 },
        podPatch: { priorityClassName },
      });
      const body = { apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", metadata: { name } };
      await bed.make(`${OURS}/modeldeployments`, { ...body, spec: specOf("nowhere") });
      let seen: Seen | undefined;
      const look = async () => {
        seen = seenOf(await everything(), "ModelDeployment", name);
        return seen;
      };
      const noticesOf = ({ status }: Seen): unknown[] => Object(status).notices ?? [];
      const isSaid = async () => noticesOf(await look()).length > 0;
      await until(isSaid, "it is said", SEEN_MS_MAX).catch((error) => {
        throw new Error(`${error.message}: ${JSON.stringify(seen)}\n${controllerSaid(bed)}`);
      });
      expect(noticesOf(await look())).toEqual([
        {
          field: "spec.podPatch",
          kind: "Refused",
          message: expect.stringContaining("no PriorityClass with name nowhere was found"),
        },
      ]);
      expect(seen?.pods).toEqual([]);
      const merge = JSON.stringify({ spec: specOf("high") });
      const { code, stderr } = await bed.plane.kubectl(["patch", "mdep", name, "--type=merge", "-p", merge]);
      expect(code, stderr).toBe(0);
      const isMended = async () => {
        const { pods } = await look();
        return pods.length === 1 && seen !== undefined && noticesOf(seen).length === 0;
      };
      await until(isMended, "the mended one is made", SEEN_MS_MAX).catch((error) => {
        throw new Error(`${error.message}: ${JSON.stringify(seen)}\n${controllerSaid(bed)}`);
      });
    },
    2 * SEEN_MS_MAX,
  );

  test("a field that nobody knows is refused by its path", async () => {
    const body = { apiVersion: "muster.dev/v1alpha1", metadata: { name: "odd" } };
    const make = (kind: Kind, spec: Spec) =>
      bed.make(`${OURS}/${KINDS[kind]}?fieldValidation=Strict&dryRun=All`, { ...body, kind, spec });
    await expect(make("ModelDeployment", { model: { source: NANO }, slo: { speed: 1 } })).rejects.toThrow(
      'unknown field "spec.slo.speed"',
    );
    await expect(make("DraftPool", { model: { source: DRAFT }, slo: {} })).rejects.toThrow('unknown field "spec.slo"');
  });
});
