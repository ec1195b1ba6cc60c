// Seeded sequences of the operations that schedules are made of, against the simulated API server and a real one: the same codes,
// reasons and objects, but for what only a server makes (uids, times, versions). What the simulator does otherwise is a bug of it.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type KubeApi, KubeError, type KubeObject } from "../../../controller/kube/api/client.ts";
import { Connections } from "../../../controller/kube/api/connections.ts";
import { kubeconfigCredentials } from "../../../controller/kube/api/credentials.ts";
import { HttpKubeApi } from "../../../controller/kube/api/http-api.ts";
import { namespaces, replicaGroups } from "../../../controller/kube/api/resources.ts";
import { admit } from "../../controller/kube/owners/deployment-bed.ts";
import { SimApiServer } from "../../sim/api-server.ts";
import { randomOf } from "../../sim/random.ts";
import { realTime } from "../../sim/virtual-time.ts";
import { until } from "../../until.ts";
import { BUILD_TIMEOUT_MS, whyNoControlPlane } from "../controlplane/binary.ts";
import { type ControlPlane, startControlPlane } from "../controlplane/start.ts";

const { signal } = new AbortController();
const NS = "replay";
const SEEDS = 20;
const STEPS = 25;
const START_MS = 120_000;
const CRDS = join(import.meta.dirname, "../../../charts/muster/templates/crds");
const why = whyNoControlPlane();
if (why !== undefined) process.stdout.write(`replays against a real API server are skipped: ${why}\n`);

const groupOf = (name: string, labels: Record<string, string> = {}): KubeObject => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ReplicaGroup",
  metadata: { name, namespace: NS, labels },
  spec: { owner: { kind: "ModelDeployment", name: "chat" }, plan: "plan-1", ordinal: 0, state: "Serving" },
});

/** Without what a server makes; versions only as whether they are the last ones seen. */
function shown({ metadata, spec, status }: KubeObject): unknown {
  const { name, labels = {}, annotations = {}, generation } = metadata;
  return { name, labels, annotations, generation, spec, status };
}

/** One seeded sequence over three names; answers what each step was and what came of it. */
async function play(api: KubeApi, seed: number): Promise<unknown[]> {
  const random = randomOf(seed);
  const pick = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)] ?? list[0] ?? never();
  const names = ["x", "y", "z"].map((letter) => `${letter}${seed}`);
  /** As it was seen at some time: current or stale. */
  const seen = new Map<string, KubeObject[]>();
  const learn = (object: KubeObject): unknown => {
    const { name } = object.metadata;
    seen.set(name, [...(seen.get(name) ?? []), object]);
    return shown(object);
  };
  const lines: unknown[] = [];
  for (let step = 0; step < STEPS; step++) {
    const name = pick(names);
    const known = pick(seen.get(name) ?? [groupOf(name)]);
    const value = pick(["1", "2"]);
    const deed = pick(Object.keys(deeds));
    const call = deeds[deed];
    try {
      const answer = await call?.(api, { name, known, value });
      lines.push([deed, name, typeof answer === "object" ? learn(answer) : answer]);
    } catch (error) {
      if (!(error instanceof KubeError)) throw error;
      lines.push([deed, name, error.code, error.reason]);
    }
  }
  const pages: string[] = [];
  let next = "";
  do {
    const page = await api.list(
      replicaGroups,
      { namespace: NS, limit: 1, ...(next ? { continue: next } : {}) },
      signal,
    );
    pages.push(...page.items.map(({ metadata }) => metadata.name).filter((name) => names.includes(name)));
    next = page.continue;
  } while (next !== "");
  return [...lines, pages];
}

function never(): never {
  throw new Error("nothing to choose from");
}

type Call = (
  api: KubeApi,
  on: { name: string; known: KubeObject; value: string },
) => Promise<KubeObject | boolean | undefined>;

const apply = (name: string, value: string) => ({
  ...groupOf(name, { by: value }),
});

const deeds: Readonly<Record<string, Call>> = {
  create: (api, { name, value }) => api.create(replicaGroups, groupOf(name, { value }), signal),
  createDry: (api, { name }) => api.create(replicaGroups, groupOf(name), signal, { dryRun: true }).then(() => true),
  get: (api, { name }) => api.get(replicaGroups, name, NS, signal),
  replace: (api, { known, value }) =>
    api.replace(replicaGroups, { ...known, metadata: { ...known.metadata, labels: { replaced: value } } }, signal),
  status: (api, { known, value }) =>
    api.replaceStatus(replicaGroups, { ...known, status: { phase: "Loading", readyRanks: Number(value) } }, signal),
  drain: (api, { name, known }) =>
    api.patch(
      replicaGroups,
      name,
      NS,
      [
        { op: "test", path: "/metadata/resourceVersion", value: known.metadata.resourceVersion ?? "0" },
        { op: "replace", path: "/spec/state", value: "Draining" },
      ],
      { type: "json" },
      signal,
    ),
  label: (api, { name, value }) =>
    api.patch(replicaGroups, name, NS, { metadata: { labels: { merged: value } } }, { type: "merge" }, signal),
  apply: (api, { name, value }) =>
    api.patch(replicaGroups, name, NS, apply(name, value), { type: "apply", fieldManager: "one" }, signal),
  applyOther: (api, { name, value }) =>
    api.patch(replicaGroups, name, NS, apply(name, value), { type: "apply", fieldManager: "other" }, signal),
  applyForced: (api, { name, value }) =>
    api.patch(
      replicaGroups,
      name,
      NS,
      apply(name, value),
      { type: "apply", fieldManager: "other", force: true },
      signal,
    ),
  deleteSeen: (api, { name, known }) => {
    const { uid, resourceVersion } = known.metadata;
    const preconditions = { ...(uid ? { uid } : {}), ...(resourceVersion ? { resourceVersion } : {}) };
    return api.delete(replicaGroups, name, NS, { preconditions }, signal);
  },
};

describe.skipIf(why !== undefined)(`replays${why === undefined ? "" : ` (skipped: ${why})`}`, () => {
  let plane: ControlPlane;
  let connections: Connections;
  let api: HttpKubeApi;

  beforeAll(async () => {
    plane = await startControlPlane({ dir: mkdtempSync(join(tmpdir(), "muster-replay-")) });
    await plane.kubectl(["apply", "-f", CRDS]);
    connections = new Connections(kubeconfigCredentials({ path: plane.kubeconfig }));
    api = new HttpKubeApi({ connections });
    await api.create(namespaces, { apiVersion: "v1", kind: "Namespace", metadata: { name: NS } }, signal);
    await until(() => api.serves(replicaGroups, signal), "the kind is served");
  }, BUILD_TIMEOUT_MS + START_MS);
  afterAll(async () => {
    await connections?.close();
    await plane?.stop();
  });

  test(
    `${SEEDS} seeds of ${STEPS} operations: the simulated server answers as the real one`,
    async () => {
      const sim = new SimApiServer(realTime, { admit });
      for (let seed = 1; seed <= SEEDS; seed++)
        expect({ seed, lines: await play(sim, seed) }).toEqual({ seed, lines: await play(api, seed) });
    },
    START_MS,
  );
});
