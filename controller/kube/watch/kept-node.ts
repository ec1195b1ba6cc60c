// What is kept of a Node in memory: all but the list of its images, which is most of it (50 of them by default) and read by nobody.
import type { KubeObject } from "../api/client.ts";
import { fieldsOf } from "../api/fields.ts";
import { withoutManagedFields } from "./kept-pod.ts";

/** For the store of nodes (StoreOptions.keep). */
export function keptNode(node: KubeObject): KubeObject {
  const { images: _, ...status } = fieldsOf(node.status);
  return { ...node, metadata: withoutManagedFields(node.metadata), status };
}
