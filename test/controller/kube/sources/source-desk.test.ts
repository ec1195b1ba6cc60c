// Sources that only pods can reach, on their way to the planner: what is said before a pod has looked, and what the claim's
// volume has to say.
import { describe, expect, test } from "vitest";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { persistentVolumeClaims, persistentVolumes, pods } from "../../../../controller/kube/api/resources.ts";
import { parseTemplate } from "../../../../controller/kube/groups/worker-template.ts";
import { ownerOf } from "../../../../controller/kube/owners/deployment-objects.ts";
import { PlanDesk } from "../../../../controller/kube/owners/plan-desk.ts";
import { Inspections } from "../../../../controller/kube/sources/inspections.ts";
import { SourceDesk } from "../../../../controller/kube/sources/source-desk.ts";
import { SourceLooks } from "../../../../controller/kube/sources/source-looks.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { deviceOf, gpuInventory } from "../../../../controller/plan/hardware.ts";
import type { Ask } from "../../../../controller/reconcile/deployment/planning.ts";
import type { Question } from "../../../../controller/reconcile/deployment/wish.ts";
import { SimApiServer } from "../../../sim/api-server.ts";
import { VirtualClock } from "../../../sim/virtual-clock.ts";
import { node } from "../objects.ts";

const NS = "serving";
const KEY = `ModelDeployment/${NS}/nano`;
const { signal: never } = new AbortController();

function deployment(model: object, spec: object = {}): KubeObject {
  return {
    apiVersion: "muster.dev/v1alpha1",
    kind: "ModelDeployment",
    metadata: { name: "nano", namespace: NS, uid: "u-1", generation: 1 },
    spec: { model, ...spec },
  };
}

class Bench {
  readonly time = new VirtualClock();
  readonly api = new SimApiServer(this.time);
  readonly asks: Ask[] = [];
  readonly news: string[] = [];
  readonly owner: KubeObject;
  readonly question: Question;
  readonly desk: SourceDesk;
  readonly stop = new AbortController();
  readonly inspections: Inspections;

  constructor(owner: KubeObject, canInspect = true) {
    this.owner = owner;
    const { wish } = ownerOf(owner);
    if (wish.kind === "refused") throw new Error(wish.fault.detail);
    this.question = wish.value.question;
    const { time: clock, api } = this;
    const [deployments, pools, nodes, podStore] = [new Store(), new Store(), new Store(), new Store()];
    deployments.learn({ ...owner, metadata: { ...owner.metadata, resourceVersion: "1" } });
    for (const name of ["node-0", "node-1"]) {
      const object = node(name);
      nodes.learn({ ...object, metadata: { ...object.metadata, uid: name, resourceVersion: "1" } });
    }
    const onChange = (changed: KubeObject) => looks.changed(changed);
    const common = { api, clock, random: () => 0.5 };
    const template = parseTemplate("", "muster/worker:test");
    this.inspections = new Inspections(
      { ...common, pods: podStore, template, target: { to: "leader:7441" }, onChange },
      this.stop.signal,
    );
    const inspections = canInspect ? this.inspections : undefined;
    const looks = new SourceLooks({ api, nodes, clock, inspections }, this.stop.signal);
    const onAnswer = (key: string) => void this.news.push(key);
    const planner = async (ask: Ask) => {
      this.asks.push(ask);
      return {
        kind: "infeasible",
        reasons: [{ code: "too-large", text: "It is too large." }],
        remedy: undefined,
      } as const;
    };
    const desk = new PlanDesk({ ...common, planner, onAnswer });
    this.desk = new SourceDesk({ desk, looks, stores: { deployments, pools }, onAnswer });
  }

  async ask(what: "first" | "better" = "first") {
    const device = deviceOf("H200");
    if (device === undefined) throw new Error("there is no H200");
    const all = gpuInventory(device, 16);
    const { question } = this;
    const againMs = this.desk.ask(KEY, { question, grounds: { free: all, all }, calibration: undefined }, what, never);
    await this.time.runFor(5);
    return againMs;
  }

  get said() {
    return this.desk.answerTo(KEY, this.question);
  }

  async claim(modes: string[], hosts: string[]): Promise<void> {
    const metadata = { name: "weights", namespace: NS };
    const spec = { accessModes: modes, volumeName: "pv" };
    await this.api.create(
      persistentVolumeClaims,
      { apiVersion: "v1", kind: "PersistentVolumeClaim", metadata, spec },
      never,
    );
    const nodeSelectorTerms = [
      { matchExpressions: [{ key: "kubernetes.io/hostname", operator: "In", values: hosts }] },
    ];
    await this.api.create(
      persistentVolumes,
      {
        apiVersion: "v1",
        kind: "PersistentVolume",
        metadata: { name: "pv" },
        spec: { nodeAffinity: { required: { nodeSelectorTerms } } },
      },
      never,
    );
  }

  async close(): Promise<void> {
    this.stop.abort();
    await this.inspections.idle();
  }
}

const PVC = { source: "pvc://weights/nano" };

describe("a source that only pods can reach", () => {
  test("L2: a claim that is not there is refused, and seen when it is", async () => {
    const bench = new Bench(deployment(PVC));
    await bench.ask();
    await bench.ask();
    expect(bench.said).toMatchObject({
      kind: "refused",
      fault: { field: "spec.model.source", detail: expect.stringContaining("claim weights is not there") },
    });
    expect(bench.news).toContain(KEY);
    expect(bench.asks).toEqual([]);
    await bench.claim(["ReadOnlyMany"], ["node-0"]);
    await bench.time.runFor(31_000);
    await bench.ask();
    await bench.ask();
    expect(bench.said).toMatchObject({ kind: "failed", detail: expect.stringContaining("nano-inspect-") });
    await bench.close();
  });

  test("the pod goes only where the volume can be mounted", async () => {
    const bench = new Bench(deployment(PVC));
    await bench.claim(["ReadOnlyMany"], ["node-1"]);
    await bench.ask();
    await bench.ask();
    const { items } = await bench.api.list(pods, { namespace: NS }, never);
    expect(items).toHaveLength(1);
    expect(JSON.stringify(items[0]?.spec)).toContain(
      '"matchFields":[{"key":"metadata.name","operator":"In","values":["node-1"]}]',
    );
    expect(JSON.stringify(items[0]?.spec)).not.toContain("node-0");
    await bench.close();
  });

  test("a volume that no node of the wish reaches is Infeasible, and no pod is made", async () => {
    const bench = new Bench(deployment(PVC));
    await bench.claim(["ReadOnlyMany"], ["elsewhere"]);
    await bench.ask();
    await bench.ask();
    expect(bench.said).toMatchObject({ kind: "infeasible", reasons: [{ code: "volume-nodes" }] });
    expect(JSON.stringify(bench.said)).toContain("kubernetes.io/hostname In [elsewhere]");
    expect((await bench.api.list(pods, { namespace: NS }, never)).items).toEqual([]);
    await bench.close();
  });

  test("ReadWriteOncePod with two workers is Infeasible with the reason", async () => {
    const bench = new Bench(deployment(PVC, { gpu: { count: 2, topology: { nodes: 2 } } }));
    await bench.claim(["ReadWriteOncePod"], ["node-0", "node-1"]);
    await bench.ask();
    await bench.ask();
    expect(bench.said).toMatchObject({
      kind: "refused",
      fault: { detail: expect.stringContaining("ReadWriteOncePod: one pod at a time may mount it") },
    });
    await bench.close();
  });

  test("L1: a secret sends a pod; the controller asks for no Secret", async () => {
    const bench = new Bench(deployment({ source: "hf://org/private", auth: { secretName: "hub" } }));
    await bench.ask();
    const { items } = await bench.api.list(pods, { namespace: NS }, never);
    expect(JSON.stringify(items[0]?.spec)).toContain(
      '{"name":"HF_TOKEN","valueFrom":{"secretKeyRef":{"name":"hub","key":"token"}}}',
    );
    expect(bench.asks).toEqual([]);
    await bench.close();
  });

  test("without an address for pods it says which flag is missing", async () => {
    const bench = new Bench(deployment({ source: "hf://org/private", auth: { secretName: "hub" } }), false);
    await bench.ask();
    expect(bench.said).toMatchObject({ kind: "refused", fault: { detail: expect.stringContaining("--listen") } });
    await bench.close();
  });

  test("file:// is a path of worker pods: a relative one is refused with what to write", async () => {
    const bench = new Bench(deployment({ source: "file://./weights" }));
    await bench.ask();
    expect(bench.said).toMatchObject({
      kind: "refused",
      fault: { detail: expect.stringContaining("write file:///absolute/path, or name a pvc:// source") },
    });
    await bench.close();
  });

  test("P4: no better plan is asked for", async () => {
    const bench = new Bench(deployment(PVC));
    expect(await bench.ask("better")).toBeUndefined();
    expect(bench.said).toBeUndefined();
    await bench.close();
  });
});

test("any other source goes to the planner as it is", async () => {
  const bench = new Bench(deployment({ source: "hf://org/open" }));
  await bench.ask();
  expect(bench.asks).toHaveLength(1);
  expect(bench.said).toMatchObject({ kind: "infeasible", reasons: [{ code: "too-large" }] });
  await bench.close();
});
