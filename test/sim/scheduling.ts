// Where the simulated scheduler may bind a pod: its seat, a node that takes pods, GPUs that nobody holds.
import type { KubeObject } from "../../controller/kube/api/client.ts";
import { fieldsOf, listOf, textOf } from "../../controller/kube/api/fields.ts";
import { pods } from "../../controller/kube/api/resources.ts";
import { nodeFacts } from "../../controller/kube/inventory/node-facts.ts";
import { podFacts } from "../../controller/kube/inventory/pod-facts.ts";
import type { SimApiServer } from "./api-server.ts";

export function hasRoom(server: SimApiServer, node: KubeObject, pod: KubeObject): boolean {
  const facts = nodeFacts(node);
  const seat = seatOf(pod);
  if (facts.notReady !== undefined || facts.isCordoned || (seat !== undefined && seat !== facts.name)) return false;
  const held = server
    .objects(pods)
    .map(podFacts)
    .filter((each) => each.node === facts.name && !each.isOver)
    .reduce((sum, each) => sum + each.gpus, 0);
  return held + podFacts(pod).gpus <= facts.gpus;
}

/** Of node affinity only what the controller writes: the node's name, by field. */
export function seatOf(pod: KubeObject): string | undefined {
  const affinity = fieldsOf(fieldsOf(fieldsOf(pod.spec).affinity).nodeAffinity);
  const required = fieldsOf(affinity.requiredDuringSchedulingIgnoredDuringExecution);
  const [term] = listOf(required.nodeSelectorTerms);
  const [field] = listOf(fieldsOf(term).matchFields);
  return textOf(listOf(fieldsOf(field).values)[0]);
}
