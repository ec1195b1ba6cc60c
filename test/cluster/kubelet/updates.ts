// Changes of ConfigMaps and Secrets, for the pods that have them mounted. Owns two watches; what a change means for a pod's files is
// volumes.ts. Kubelets look once a minute; here a change is there at once, so that tests wait for a condition and not for a minute.
import { EventEmitter } from "node:events";
import type { RawApi, Thing } from "../controlplane/raw-api.ts";
import type { Pod, Projection, Volume } from "./pod.ts";
import { pause } from "./probe.ts";

const RETRY_MS = 500;
const KINDS = ["configmaps", "secrets"] as const;
type Kind = (typeof KINDS)[number];

/** Emits "changed" with `KIND NAMESPACE/NAME`; after an outage for each that there is. */
export class Updates extends EventEmitter<{ changed: [string] }> {
  readonly #stop = new AbortController();

  constructor() {
    super();
    this.setMaxListeners(0); // one for each pod
  }

  /** Follows both kinds until `stop`. */
  async follow(api: RawApi): Promise<void> {
    await Promise.all(KINDS.map((kind) => this.#keep(api, kind)));
  }

  stop(): void {
    this.#stop.abort();
  }

  async #keep(api: RawApi, kind: Kind): Promise<void> {
    const { signal } = this.#stop;
    const tell = ({ metadata }: Thing) => this.emit("changed", `${kind} ${metadata.namespace}/${metadata.name}`);
    const hear = {
      whole: (all: Thing[]) => all.forEach(tell),
      changed: (type: string, thing: Thing) => {
        if (type === "ADDED" || type === "MODIFIED") tell(thing);
      },
    };
    while (!signal.aborted) {
      await api.follow(`/api/v1/${kind}`, hear, signal).catch(() => undefined); // away or stale: list again
      await pause(RETRY_MS, signal);
    }
  }
}

/** Whether the volume has something of `changed`. */
export function isMadeFrom(pod: Pod, { configMap, secret, projected }: Volume, changed: string): boolean {
  const key = (kind: Kind, name: string | undefined) => `${kind} ${pod.metadata.namespace}/${name}`;
  const named = ({ configMap: map, secret: of }: Pick<Projection, "configMap" | "secret">) =>
    key("configmaps", map?.name) === changed || key("secrets", of?.name) === changed;
  if (key("secrets", secret?.secretName) === changed) return true;
  return named({ configMap }) || (projected?.sources ?? []).some(named);
}
