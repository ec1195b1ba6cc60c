// From `helm install` to tokens and back, on a real API server: two controllers, two gateways and NATS as the chart runs them, a
// model on 4 ranks over 2 nodes with a pool of drafts, in namespaces that enforce `restricted`. All links are mutual TLS, each pod
// has a network of its own, and every connection of a pod is judged by the NetworkPolicies that were installed. Names come from
// hosts files here, so that the way to DNS is not observed; chart-edges.test.ts judges it.
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { z } from "zod";
import { Policies } from "../../charts/policies.ts";
import { chunksOf } from "../../controller/gateway/sse-client.ts";
import { isAlive } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS } from "./bed.ts";
import { Client } from "./client.ts";
import { DEPLOYMENTS, HOME, Installation, type Pod, RUN_MS_MAX, WORK } from "./installation.ts";
import { askedOf, edgesOf } from "./observed.ts";

const why = whyNoControlPlane();
const OURS = `/apis/muster.dev/v1alpha1/namespaces/${WORK}`;
const PLURALS = ["modeldeployments", "draftpools", "shardplans", "replicagroups"];
/** Of a model that meets no trouble. */
const PHASES = ["Scheduling", "Pulling", "Loading", "Connecting", "Warming", "Serving"];
const PORTS = [443, 4222, 6443, 7440, 7441, 7442, 7443, 8080, 8081, 8222];

const OBJECTS = `
apiVersion: muster.dev/v1alpha1
kind: DraftPool
metadata: { name: drafts }
spec:
  model: { source: "builtin://nano-draft" }
---
apiVersion: muster.dev/v1alpha1
kind: ModelDeployment
metadata: { name: nano }
spec:
  model: { source: "builtin://nano-maverick" }
  gpu: { count: 4, topology: { nodes: 2 } }
  parallelism: { tp: 4, ep: 2, etp: 2 }
  speculation: { draftPool: drafts }
  slo: { concurrency: 8 }
  rollout: { drainTimeout: 5s }
`;

const Group = z.looseObject({
  metadata: z.looseObject({ name: z.string() }),
  spec: z.looseObject({ owner: z.looseObject({ name: z.string() }) }),
  status: z
    .looseObject({
      phase: z.string().optional(),
      ready: z.string().optional(),
      incarnation: z.number().optional(),
      restarts: z.number().default(0),
      step: z.number().default(0),
      placement: z.array(z.looseObject({ node: z.string(), pod: z.string(), ranks: z.number() })).default([]),
    })
    .default({ placement: [], restarts: 0, step: 0 }),
});
type Group = z.infer<typeof Group>;
const Namespace = z.looseObject({
  metadata: z.looseObject({ name: z.string(), labels: z.record(z.string(), z.string()) }),
});
const Deployment = z.looseObject({
  metadata: z.looseObject({ name: z.string() }),
  status: z.looseObject({ phase: z.string().optional(), eta: z.string().optional() }).default({}),
});

/** Under way for seconds; the kills come with its first tokens. */
const LONG = {
  model: "nano",
  prompt: "My fellow citizens,",
  max_tokens: 1_200,
  n: 8,
  temperature: 0.7,
  seed: 11,
  ignore_eos: true,
  stream: true,
  stream_options: { include_usage: true },
  muster: { return_token_ids: true },
};

describe.skipIf(why !== undefined)(
  `the chart, installed and used${why ? ` (skipped: ${why})` : ""}`,
  { timeout: 2 * RUN_MS_MAX },
  () => {
    let all: Installation;
    let clients: Client[] = [];

    beforeAll(async () => {
      all = await Installation.start(["gpu-a", "gpu-b"].map((name) => ({ name, gpus: 6 })));
    }, BED_TIMEOUT_MS);
    afterAll(async () => {
      await all?.bed.stop();
    });

    const kubectl = async (...args: string[]) => await all.bed.plane.kubectl(args);
    const list = async (path: string) => (await all.bed.plane.api.list(path)).items;

    const names = async (plural: string) => (await list(`${OURS}/${plural}`)).map(({ metadata }) => metadata.name);

    /** Groups of the model. */
    async function groups(): Promise<Group[]> {
      return (await list(`${OURS}/replicagroups`))
        .map((item) => Group.parse(item))
        .filter(({ spec }) => spec.owner.name === "nano");
    }

    /** The only group that the model has. */
    async function group(): Promise<Group> {
      const found = await groups();
      expect(found).toHaveLength(1);
      return Group.parse(found[0]);
    }

    async function workers({ status }: Group): Promise<(Pod & { ranks: number })[]> {
      const pods = await all.podsOf("worker", WORK);
      return status.placement.map(({ pod: name, ranks }) => {
        const pod = pods.find(({ metadata }) => metadata.name === name);
        if (pod === undefined) throw new Error(`pod ${name} is not there`);
        return { ...pod, ranks };
      });
    }

    /** Asks for the golden prompts, again and again, until the test ends or `stop`; what went wrong is thrown by `stop`. */
    function traffic(client: Client): { stop: () => Promise<void> } {
      let isOver = false;
      const asking = (async () => {
        while (!isOver) await client.expectGolden();
      })();
      asking.catch(() => {});
      onTestFinished(() => {
        isOver = true;
      });
      const stop = async () => {
        isOver = true;
        await asking;
      };
      return { stop };
    }

    async function knock(): Promise<void> {
      const key = await all.key();
      clients = (await all.doors()).map((door) => new Client(door, key));
    }

    /** Drafts come in time at some point; whatever comes of them, each answer is the golden one. */
    async function accepted(client: Client | undefined): Promise<void> {
      let last = "";
      const isSo = async () => {
        const drafts = await client?.expectGolden();
        last = JSON.stringify(drafts);
        return (drafts?.accepted ?? 0) > 0;
      };
      await all.waits(isSo, "drafts are accepted", () => last);
    }

    test("`helm install`: two controllers, two gateways and NATS come up; `helm test` passes without a model", async () => {
      expect(await all.install()).toMatchObject({ code: 0 });
      await all.rolledOut(...DEPLOYMENTS);
      expect(await all.podsOf("controller")).toHaveLength(2);
      expect(await all.podsOf("gateway")).toHaveLength(2);
      await all.waits(async () => (await all.leader()) !== undefined, "one controller leads");
      expect(await all.bed.plane.helm(["test", "muster", "-n", HOME])).toMatchObject({ code: 0 });
      // What both namespaces have admitted was asked for: this is not.
      for (const namespace of [HOME, WORK]) {
        const { code, stderr } = await kubectl("run", "plain", "--image=plain", "-n", namespace);
        expect({ code, stderr }).toMatchObject({ code: 1, stderr: expect.stringContaining('PodSecurity "restricted') });
      }
    });

    test("`kubectl apply`: the model serves on 4 ranks over 2 nodes; columns say so", async () => {
      const phases: string[] = [];
      const etas: string[] = [];
      const see = (thing: unknown) => {
        const { metadata, status } = Deployment.parse(thing);
        if (metadata.name !== "nano") return;
        if (status.phase !== undefined && phases.at(-1) !== status.phase) phases.push(status.phase);
        if (status.eta !== undefined) etas.push(`${status.phase} ${status.eta}`);
      };
      const end = new AbortController();
      onTestFinished(() => end.abort());
      const hear = {
        whole: (things: unknown[]) => things.forEach(see),
        changed: (_: string, thing: unknown) => see(thing),
      };
      const watched = all.bed.plane.api.follow(`${OURS}/modeldeployments`, hear, end.signal).catch(() => {});
      expect(await all.bed.plane.kubectl(["apply", "-n", WORK, "-f", "-"], OBJECTS)).toMatchObject({ code: 0 });
      for (const what of ["draftpool/drafts", "mdep/nano"]) {
        const args = ["wait", "-n", WORK, what, "--for=condition=Serving", "--timeout=30s"];
        await all.succeeds(`${what} serves`, args);
      }
      end.abort();
      await watched;
      const { status } = await group();
      expect(status).toMatchObject({ phase: "Serving", ready: "4/4", incarnation: 1, restarts: 0 });
      expect(status.placement.map(({ node, ranks }) => `${node} ${ranks}`).toSorted()).toEqual(["gpu-a 2", "gpu-b 2"]);
      const shown = await all.columns("mdep", "nano");
      expect(Object.keys(shown)).toEqual(["NAME", "PLAN", "READY", "PHASE", "TOK/S", "ETA", "AGE"]);
      const wanted = { NAME: "nano", PLAN: "tp4·ep2·1x", READY: "4/4", PHASE: "Serving", ETA: "" };
      expect(shown).toMatchObject({ ...wanted, AGE: expect.stringMatching(/^\d+[ms]/) });
      expect(phases.at(-1)).toBe("Serving");
      expect(phases.length, phases.join()).toBeGreaterThan(1);
      for (const phase of phases) expect(PHASES, phases.join()).toContain(phase);
      for (const eta of etas) expect(eta).toMatch(/^(Pulling|Loading|Connecting|Warming) (\d+m)?\d+s$/);
    });

    test("every door gives the golden tokens: OpenAI, streamed, gRPC; drafts are accepted; `helm test` passes", async () => {
      await knock();
      expect(clients.map(({ door }) => door.name)).toHaveLength(3);
      for (const client of clients) {
        await client.expectGolden();
        await client.expectGoldenStreams();
        await client.expectGoldenOverGrpc();
      }
      await accepted(clients[0]);
      expect(await all.bed.plane.helm(["test", "muster", "-n", HOME])).toMatchObject({ code: 0 });
    });

    test("each rank computes in the process of its worker, step by step; TOK/S is a number meanwhile", async () => {
      const [client] = clients;
      if (client === undefined) throw new Error("no door");
      const before = await group();
      const pods = await workers(before);
      expect(new Set(pods.map((pod) => all.pidOf(pod))).size).toBe(2);
      const times = pods.map((pod) => all.engineTimes(pod));
      const { stop } = traffic(client);
      // The step of a group is that of its last rank; a follower's is what its own process has answered.
      const hasGrown = async () => (await group()).status.step > before.status.step;
      await all.waits(hasGrown, "all ranks have done more steps");
      let shown: Record<string, string> = {};
      const isNumber = async () => {
        shown = await all.columns("mdep", "nano");
        return /^[1-9]\d*(\.\d+)?k?$|^0\.[1-9]$/.test(shown["TOK/S"] ?? "");
      };
      await all.waits(isNumber, "TOK/S is a number", () => JSON.stringify(shown));
      await stop();
      for (const [i, pod] of pods.entries()) {
        const busy = [...all.engineTimes(pod)].filter(([thread, ns]) => ns > (times[i]?.get(thread) ?? 0));
        expect(busy.length, `threads of ${pod.metadata.name}`).toBeGreaterThanOrEqual(pod.ranks);
      }
    });

    test("killed mid-stream: the leading controller, a gateway, NATS; what they did not carry goes on, token for token", async () => {
      const [, client, victim] = clients;
      const leader = await all.leader();
      if (client === undefined || victim === undefined || leader === undefined) throw new Error("somebody is missing");
      const undisturbed = await chunksOf(await client.post(LONG));
      expect(undisturbed).toMatchObject({ isDone: true, error: undefined });
      expect(undisturbed.texts).toHaveLength(LONG.n);
      const before = await group();
      const [gateway] = (await all.podsOf("gateway")).filter(({ metadata }) => metadata.name === victim.door.name);
      const [nats] = await all.podsOf("nats");
      if (gateway === undefined || nats === undefined) throw new Error("no pod to kill");

      let isDone = false;
      const going = chunksOf(await client.post(LONG)).finally(() => {
        isDone = true;
      });
      const lost = expect(chunksOf(await victim.post(LONG))).rejects.toThrow();
      await Promise.all([leader.pod, gateway, nats].map((pod) => all.kill(pod)));
      for (const pod of [leader.pod, gateway, nats])
        await all.waits(() => all.pidOf(pod) === 0, `${pod.metadata.name} has ended`);
      expect(isDone, "the stream has ended before the last of them").toBe(false);
      await lost;
      const got = await going;
      expect(got).toMatchObject({ isDone: true, error: undefined });
      expect(got.usage.muster.resumes).toBeUndefined();
      expect({ ids: got.ids, texts: got.texts }).toEqual({ ids: undisturbed.ids, texts: undisturbed.texts });
      await client.expectGolden();

      let next: Awaited<ReturnType<Installation["leader"]>>;
      const hasNext = async () => {
        next = await all.leader();
        return next !== undefined && next.holder !== leader.holder;
      };
      await all.waits(hasNext, "another controller leads");
      expect(next?.pod.metadata.name).not.toBe(leader.pod.metadata.name);
      await all.rolledOut(...DEPLOYMENTS);
      const { metadata, status } = await group();
      expect(metadata.name).toBe(before.metadata.name);
      expect(status).toMatchObject({ phase: "Serving", incarnation: 1, restarts: 0 });
      await knock();
      for (const each of clients) await each.expectGolden();
      await accepted(clients[0]);
    });

    test("`kubectl scale`: the controller that took over adds a group, and both serve", async () => {
      const kept = await group();
      const plans = await names("shardplans");
      expect(await kubectl("scale", "mdep/nano", "-n", WORK, "--replicas=2")).toMatchObject({ code: 0 });
      const areServing = async () => {
        const found = await groups();
        return found.length === 2 && found.every(({ status }) => status.phase === "Serving");
      };
      await all.waits(areServing, "two groups serve");
      expect(await names("shardplans")).toEqual(plans);
      const both = await groups();
      expect(both.find(({ metadata }) => metadata.name === kept.metadata.name)?.status).toMatchObject({
        incarnation: 1,
      });
      let shown: Record<string, string> = {};
      const isShown = async () => {
        shown = await all.columns("mdep", "nano");
        return shown.PLAN === "tp4·ep2·2x" && shown.READY === "8/8" && shown.PHASE === "Serving";
      };
      await all.waits(isShown, "columns say so", () => JSON.stringify(shown));
      // Each gateway spreads what it is asked at once over both.
      for (const client of clients.slice(1)) {
        const haveAnswered = async () => {
          await Promise.all(Array.from({ length: 4 }, () => client.expectGolden()));
          const given = await answered(client);
          return both.every(({ metadata }) => (given.get(metadata.name) ?? 0) > 0);
        };
        await all.waits(haveAnswered, `both groups have answered ${client.door.name}`);
      }
    });

    /** Requests that a gateway has given to each group. */
    async function answered(client: Client): Promise<Map<string, number>> {
      const text = await (await client.get("/metrics")).text();
      const lines = text.matchAll(/^muster_gateway_replica_requests_total\{[^}]*replica="([^"]+)"[^}]*\} (\d+)/gm);
      return new Map([...lines].map(([, name = "", count]) => [name.replace(`${WORK}/`, ""), Number(count)]));
    }

    test("deleted, nothing is left of it: objects, pods, processes", async () => {
      const pids = (await all.podsOf("worker", WORK)).map((pod) => all.pidOf(pod));
      expect(pids.filter((pid) => isAlive(pid) && pid > 0)).toHaveLength(5); // 2 groups of 2, and a draft
      expect(await kubectl("delete", "mdep/nano", "draftpool/drafts", "-n", WORK)).toMatchObject({ code: 0 });
      const kinds = [
        ...PLURALS.map((plural) => `${OURS}/${plural}`),
        ...["pods", "services", "endpoints", "secrets"].map((plural) => `/api/v1/namespaces/${WORK}/${plural}`),
        `/apis/policy/v1/namespaces/${WORK}/poddisruptionbudgets`,
        `/apis/discovery.k8s.io/v1/namespaces/${WORK}/endpointslices`,
        `/apis/scheduling.k8s.io/v1beta1/namespaces/${WORK}/podgroups`,
      ];
      let left: string[] = [];
      const isEmpty = async () => {
        const found = await Promise.all(kinds.map(async (path) => ({ path, items: await list(path) })));
        left = found.flatMap(({ path, items }) => items.map(({ metadata }) => `${path}/${metadata.name}`));
        return left.length === 0;
      };
      await all.waits(isEmpty, "nothing is left", () => left.join("\n"));
      expect(pids.filter((pid) => isAlive(pid))).toEqual([]);
    });

    test("every connection that was observed is allowed by the NetworkPolicies", async () => {
      const namespaces = (await list("/api/v1/namespaces")).map((item) => Namespace.parse(item).metadata);
      const labels = Object.fromEntries(namespaces.map((each) => [each.name, each.labels]));
      const installed = await list("/apis/networking.k8s.io/v1/networkpolicies");
      const policies = new Policies(
        installed.map((policy) => ({ ...policy, kind: "NetworkPolicy" })),
        labels,
      );
      const seen = all.bed.connections();
      const edges = edgesOf(seen, PORTS);
      expect(edges).toEqual(
        expect.arrayContaining([
          "controller -> 127.0.0.1:6443 by its Service",
          "gateway -> 127.0.0.1:6443 by its Service",
          "controller -> worker:7440",
          "gateway -> controller:7441",
          "gateway -> controller:7442",
          "gateway -> worker:7440",
          "test -> gateway:8080 by its Service",
          "worker -> controller:7441",
          "worker -> nats:4222 by its Service",
          "worker -> worker:7440",
          "worker -> worker:*",
        ]),
      );
      expect(edges, "kubelets bring the certificates of workers").not.toContain("worker -> controller:7442");
      expect(policies.refused(askedOf(seen)), edges.join("\n")).toEqual([]);
      // The same connections from a stranger's pod: the policies refuse all that are not the gateways' front.
      const stranger = { kind: "pod", name: "app", namespace: WORK, labels: {}, ip: "10.244.9.9" } as const;
      const inner = askedOf(seen).filter(({ to, port }) => to.kind === "pod" && ![8080, 8081].includes(port));
      expect(policies.refused(inner.map((each) => ({ ...each, from: stranger })))).toHaveLength(inner.length);
    });

    test("`helm uninstall` ends its pods and keeps the custom resources", async () => {
      const kept = OBJECTS.split("---")[1]
        ?.replace("name: nano", "name: kept")
        .replace("spec:", "spec:\n  replicas: 0");
      expect(await all.bed.plane.kubectl(["apply", "-n", WORK, "-f", "-"], kept)).toMatchObject({ code: 0 });
      expect(await all.bed.plane.helm(["uninstall", "muster", "-n", HOME])).toMatchObject({ code: 0 });
      const isGone = async () => (await list(`/api/v1/namespaces/${HOME}/pods`)).length === 0;
      await all.waits(isGone, "its pods are gone");
      expect(await names("modeldeployments")).toEqual(["kept"]);
      const { stdout } = await kubectl("get", "crd", "-o", "name");
      for (const plural of PLURALS) expect(stdout).toContain(`${plural}.muster.dev`);
    });
  },
);
