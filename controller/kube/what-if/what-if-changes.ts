// What may be supposed of a cluster before planning on it: a small grammar, read and carried out on a stage (what-if-stage.ts).
// Owns the grammar and its errors, which name the token that is wrong.
//
//   nodes-=NAME[,NAME]            the nodes are gone, with what runs there
//   nodes+=COUNTxPRODUCTxGPUS     that many new nodes, ready and free of taints
//   nodes+=COUNTxlike:NAME        that many copies of a node: its GPUs, labels and taints, with nothing on them
//   gpus-=NAME:COUNT, gpus+=NAME:COUNT   the node offers that many GPUs fewer or more
//   delete=[NAMESPACE/]NAME       the ModelDeployment or DraftPool of that name is gone, with all of its replicas
import { DEVICES_MAX, deviceOf, PRODUCTS } from "../../plan/hardware.ts";
import type { KubeObject } from "../api/client.ts";
import { fieldsOf } from "../api/fields.ts";
import { nodeFacts } from "../inventory/node-facts.ts";
import { GPU_RESOURCE } from "../inventory/pod-facts.ts";
import type { Stage } from "./what-if-stage.ts";

export type Change =
  | { kind: "remove-nodes"; names: readonly string[] }
  | { kind: "add-nodes"; count: number; product: string; gpus: number }
  | { kind: "copy-node"; count: number; name: string }
  | { kind: "gpus"; name: string; by: number }
  | { kind: "delete"; namespace: string; name: string };

const NODES_MAX = 10_000;
const NAMED_MAX = 8;

export const CHANGE_HELP = [
  "  nodes-=NAME[,NAME]         these nodes are gone, with what runs there",
  "  nodes+=COUNTxPRODUCTxGPUS  new nodes, such as 4xH200x8",
  "  nodes+=COUNTxlike:NAME     copies of a node: its GPUs, labels and taints",
  "  gpus-=NAME:COUNT           the node offers so many GPUs fewer (gpus+= more)",
  "  delete=[NAMESPACE/]NAME    the ModelDeployment or DraftPool is gone, with its replicas",
].join("\n");

/** A string says what is wrong, with the token. */
export function parseChange(text: string, namespace: string): Change | string {
  const match = /^(nodes-|nodes\+|gpus-|gpus\+|delete)=(.*)$/.exec(text.trim());
  const [, verb = "", value = ""] = match ?? [];
  if (match === null) return `"${text}": write nodes-=, nodes+=, gpus-=, gpus+= or delete=, see --help`;
  if (value === "") return `"${text}": nothing follows ${verb}=`;
  switch (verb) {
    case "nodes-":
      return removed(value);
    case "nodes+":
      return added(value);
    case "delete":
      return deleted(value, namespace);
    default:
      return offered(value, verb === "gpus-" ? -1 : 1);
  }
}

function removed(value: string): Change | string {
  const names = value.split(",");
  const wrong = names.find((name) => !isName(name));
  return wrong === undefined ? { kind: "remove-nodes", names } : `"${wrong}" is no name of a node`;
}

function added(value: string): Change | string {
  const [, many = "", what = ""] = /^(\d{1,5})x(.+)$/.exec(value) ?? [];
  const count = Number(many);
  if (count < 1 || count > NODES_MAX)
    return `"${value}" is not COUNTxPRODUCTxGPUS, such as 4xH200x8, nor COUNTxlike:NODE; at most ${NODES_MAX} nodes`;
  if (what.startsWith("like:")) {
    const name = what.slice("like:".length);
    return isName(name) ? { kind: "copy-node", count, name } : `"${name}" is no name of a node`;
  }
  const [, product = "", each = ""] = /^(.+)x(\d{1,4})$/.exec(what) ?? [];
  const device = deviceOf(product);
  if (device === undefined || device.product === "cpu")
    return `"${product || what}" is not a known product; known: ${PRODUCTS.filter((name) => name !== "cpu").join(", ")}`;
  const gpus = Number(each);
  if (gpus < 1 || gpus > DEVICES_MAX) return `"${each}" GPUs of one node: write 1 to ${DEVICES_MAX}`;
  return { kind: "add-nodes", count, product: device.product, gpus };
}

function deleted(value: string, home: string): Change | string {
  const parts = value.split("/");
  const [namespace = "", name = ""] = parts.length === 1 ? [home, value] : parts;
  if (parts.length > 2 || !isName(namespace) || !isName(name)) return `"${value}" is not [NAMESPACE/]NAME`;
  return { kind: "delete", namespace, name };
}

function offered(value: string, sign: number): Change | string {
  const [, name = "", count = ""] = /^(.+):(\d{1,4})$/.exec(value) ?? [];
  if (!isName(name) || Number(count) < 1) return `"${value}" is not NODE:COUNT, such as gpu-3:2`;
  return { kind: "gpus", name, by: sign * Number(count) };
}

const isName = (text: string): boolean => /^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$/.test(text);

/** Carries it out; a string says what it names that is not there. */
export function applyChange(stage: Stage, change: Change): string | undefined {
  switch (change.kind) {
    case "remove-nodes": {
      const strange = change.names.find((name) => stage.node(name) === undefined);
      if (strange !== undefined) return noNode(stage, strange);
      for (const name of change.names) stage.removeNode(name);
      return undefined;
    }
    case "add-nodes":
      return addNodes(stage, change.count, newNode(change.product, change.gpus));
    case "copy-node": {
      const like = stage.node(change.name);
      return like === undefined ? noNode(stage, change.name) : addNodes(stage, change.count, copyOf(like));
    }
    case "gpus":
      return offer(stage, change);
    case "delete":
      return remove(stage, `${change.namespace}/${change.name}`);
    default:
      throw new Error(`unreachable: ${JSON.stringify(change satisfies never)}`);
  }
}

function noNode(stage: Stage, name: string): string {
  const names = stage.nodeNames();
  const more = names.length > NAMED_MAX ? `, and ${names.length - NAMED_MAX} more` : "";
  return `there is no node "${name}"; there are ${names.slice(0, NAMED_MAX).join(", ") || "none"}${more}`;
}

function remove(stage: Stage, key: string): string | undefined {
  const kinds = (["deployments", "pools"] as const).filter(
    (kind) => stage.ownerAt(kind === "pools" ? "DraftPool" : "ModelDeployment", key) !== undefined,
  );
  for (const kind of kinds) stage.remove(kind, key);
  return kinds.length > 0 ? undefined : `there is no ModelDeployment or DraftPool "${key}"`;
}

function offer(stage: Stage, { name, by }: Extract<Change, { kind: "gpus" }>): string | undefined {
  const node = stage.node(name);
  if (node === undefined) return noNode(stage, name);
  const { gpus } = nodeFacts(node);
  if (gpus + by < 0) return `node "${name}" offers ${gpus} GPUs, not ${-by}`;
  const status = fieldsOf(node.status);
  const allocatable = { ...fieldsOf(status.allocatable ?? status.capacity), [GPU_RESOURCE]: String(gpus + by) };
  stage.add("nodes", { ...node, status: { ...status, allocatable } });
  return undefined;
}

function addNodes(stage: Stage, count: number, like: KubeObject): string | undefined {
  const taken = new Set(stage.nodeNames());
  for (let made = 0, number = 1; made < count; number++) {
    const name = `new-${number}`;
    if (taken.has(name)) continue;
    // A fabric of its own: whether a new node joins an NVLink domain nobody has said.
    const shared = Object.entries(like.metadata.labels ?? {}).filter(([key]) => key !== "nvidia.com/gpu.clique");
    const labels = { ...Object.fromEntries(shared), "kubernetes.io/hostname": name };
    stage.add("nodes", { ...like, metadata: { name, labels } });
    made++;
  }
  return undefined;
}

const READY = [{ type: "Ready", status: "True" }];

function newNode(product: string, gpus: number): KubeObject {
  const allocatable = { [GPU_RESOURCE]: String(gpus), pods: "110" };
  const labels = { "nvidia.com/gpu.product": product, "nvidia.com/gpu.count": String(gpus) };
  const status = { allocatable, capacity: allocatable, conditions: READY };
  return { apiVersion: "v1", kind: "Node", metadata: { name: "", labels }, spec: {}, status };
}

/** Ready and not cordoned, whatever the node is; a taint that says that it is not is left behind. */
function copyOf(node: KubeObject): KubeObject {
  const taints = nodeFacts(node).taints.filter(({ key }) => !key.startsWith("node.kubernetes.io/"));
  const status = { ...fieldsOf(node.status), conditions: READY };
  return { ...node, metadata: { name: "", labels: node.metadata.labels ?? {} }, spec: { taints }, status };
}
