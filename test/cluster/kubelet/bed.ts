// A small cluster for a test file: control plane, nodes, and the words that tests of it need. Waits for conditions, never for
// a time; what it waited for in vain is said with what was there instead.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { z } from "zod";
import { until } from "../../until.ts";
import { BUILD_TIMEOUT_MS } from "../controlplane/binary.ts";
import { type ControlPlane, startControlPlane } from "../controlplane/start.ts";
import type { Connection } from "./connections.ts";
import { Nodes, type ProcessKubelet } from "./kubelet.ts";
import type { NodeWish } from "./node.ts";

/** For the hook that starts a bed: the binary may have to be built first. */
export const BED_TIMEOUT_MS = BUILD_TIMEOUT_MS + 60_000;
export const POD_PATH = "/api/v1/namespaces/default/pods";
const ANSWER_MS_MAX = 10_000;

const PodSeen = z.looseObject({
  metadata: z.looseObject({ name: z.string(), uid: z.string(), deletionTimestamp: z.string().optional() }),
  spec: z.looseObject({ nodeName: z.string().optional() }),
  status: z.looseObject({
    phase: z.string(),
    reason: z.string().optional(),
    podIP: z.string().optional(),
    conditions: z
      .array(z.looseObject({ type: z.string(), status: z.string(), message: z.string().optional() }))
      .default([]),
    containerStatuses: z
      .array(
        z.looseObject({
          restartCount: z.number(),
          state: z.looseObject({
            terminated: z.looseObject({ exitCode: z.number(), message: z.string().optional() }).optional(),
            waiting: z.looseObject({ reason: z.string(), message: z.string().optional() }).optional(),
          }),
        }),
      )
      .default([]),
  }),
});
export type PodSeen = z.infer<typeof PodSeen>;
const NodeSeen = z.looseObject({
  spec: z.looseObject({ taints: z.array(z.unknown()).default([]) }),
  status: z.looseObject({ conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })) }),
});
type Wanted = {
  nodes: readonly NodeWish[];
  entrypoints?: Readonly<Record<string, readonly string[]>>;
  featureGates?: Record<string, boolean>;
  /** Each pod has a network of its own: see `connections`. */
  podNetworks?: boolean;
  /** How long a node may be silent before it is NotReady; default: that of the control plane, for tests of dead nodes. */
  nodeGraceSeconds?: number;
};

export const isReady = ({ status }: PodSeen): boolean =>
  status.conditions.some((condition) => condition.type === "Ready" && condition.status === "True");
export const restarts = ({ status }: PodSeen): number => status.containerStatuses[0]?.restartCount ?? 0;

export class Bed {
  readonly plane: ControlPlane;
  readonly nodes: Nodes;
  readonly #kubelets: Map<string, ProcessKubelet>;

  private constructor(plane: ControlPlane, nodes: Nodes, kubelets: Map<string, ProcessKubelet>) {
    this.plane = plane;
    this.nodes = nodes;
    this.#kubelets = kubelets;
  }

  static async start(wanted: Wanted): Promise<Bed> {
    const { nodes: wishes, entrypoints = {}, featureGates = {}, podNetworks = false, nodeGraceSeconds } = wanted;
    const plane = await startControlPlane({
      dir: mkdtempSync(join(tmpdir(), "muster-bed-")),
      featureGates,
      podNetworks,
      ...(nodeGraceSeconds === undefined ? {} : { nodeGraceSeconds }),
    });
    try {
      const nodes = new Nodes(plane, entrypoints, podNetworks);
      const added = await Promise.all(wishes.map((wish) => nodes.add(wish)));
      return new Bed(plane, nodes, new Map(added.map((kubelet) => [kubelet.name, kubelet])));
    } catch (error) {
      await plane.stop();
      throw error;
    }
  }

  async stop(): Promise<void> {
    await this.nodes.stop();
    await this.plane.stop();
  }

  /** Which pods have talked to whom since the bed began; throws where pods have no networks of their own. */
  connections(): Connection[] {
    return this.nodes.connections();
  }

  async make(path: string, body: unknown): Promise<void> {
    await this.plane.api.ask({ method: "POST", path, body });
  }

  async remove(path: string): Promise<void> {
    await this.plane.api.ask({ method: "DELETE", path });
  }

  /** Deletes pods of the default namespace; resolves when they are gone. */
  async end(...names: string[]): Promise<void> {
    for (const name of names) await this.remove(`${POD_PATH}/${name}`);
    for (const name of names) await this.gone(name);
  }

  async find(name: string): Promise<PodSeen | undefined> {
    const found = await this.plane.api.find(`${POD_PATH}/${name}`);
    return found === undefined ? undefined : PodSeen.parse(found);
  }

  /** The pod once `isSo`. */
  async seen(name: string, what: string, isSo: (pod: PodSeen) => boolean, boundMs?: number): Promise<PodSeen> {
    let last: PodSeen | undefined;
    const look = async () => {
      last = await this.find(name);
      return last !== undefined && isSo(last);
    };
    await until(look, `${name} ${what}`, boundMs).catch((error) => {
      throw new Error(`${error.message}; it is ${JSON.stringify(last?.status)}`);
    });
    return PodSeen.parse(last);
  }

  async ready(name: string, boundMs?: number): Promise<PodSeen> {
    return await this.seen(name, "is ready", isReady, boundMs);
  }

  async gone(name: string, boundMs?: number): Promise<void> {
    await until(async () => (await this.find(name)) === undefined, `${name} is gone`, boundMs);
  }

  /** Ready and free of taints: pods are bound to it. */
  async isNodeReady(name: string): Promise<boolean> {
    const node = NodeSeen.parse(await this.plane.api.ask({ method: "GET", path: `/api/v1/nodes/${name}` }));
    const ready = node.status.conditions.find(({ type }) => type === "Ready");
    return ready?.status === "True" && node.spec.taints.length === 0;
  }

  kubelet(name = ""): ProcessKubelet {
    const kubelet = this.#kubelets.get(name);
    if (!kubelet) throw new Error(`no kubelet ${name}`);
    return kubelet;
  }

  /** Process id of the pod's container `main`; 0 where it does not run. */
  pid({ metadata, spec }: PodSeen): number {
    return this.kubelet(spec.nodeName).pids("default", metadata.name).get("main") ?? 0;
  }

  /** What the pod's program (answering.ts) says. */
  async ask({ status }: PodSeen, path: string): Promise<string> {
    const target = { address: status.podIP ?? "", port: 8080, path };
    return (await this.plane.space.get(target, AbortSignal.timeout(ANSWER_MS_MAX))).body;
  }
}
