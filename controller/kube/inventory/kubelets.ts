// Whether the kubelets of all nodes with GPUs know certificates of pods: a volume that one does not know how to fill would keep
// its pod from ever starting. Counted as nodes come and go, not for each pod.
import type { KubeObject } from "../api/client.ts";
import { fieldsOf, textOf } from "../api/fields.ts";
import type { Store } from "../watch/store.ts";
import { nodeFacts } from "./node-facts.ts";

/** Minor version at which it is on unless somebody turns it off. */
const CERTIFICATES_SINCE = 37;

export class Kubelets {
  /** Names of nodes with an older one. */
  readonly #older = new Set<string>();

  constructor(nodes: Store) {
    for (const node of nodes.all()) this.#look(node);
    nodes.subscribe(({ kind, object }) => {
      if (kind === "deleted") this.#older.delete(object.metadata.name);
      else this.#look(object);
    });
  }

  get areCurrent(): boolean {
    return this.#older.size === 0;
  }

  #look(node: KubeObject): void {
    if (nodeFacts(node).gpus > 0 && isOlder(node)) this.#older.add(node.metadata.name);
    else this.#older.delete(node.metadata.name);
  }
}

/** One that does not say its version counts as older. */
function isOlder({ status }: KubeObject): boolean {
  const version = textOf(fieldsOf(fieldsOf(status).nodeInfo).kubeletVersion) ?? "";
  const [, major = "0", minor = "0"] = /^v(\d+)\.(\d+)/.exec(version) ?? [];
  return Number(major) < 1 || (Number(major) === 1 && Number(minor) < CERTIFICATES_SINCE);
}
