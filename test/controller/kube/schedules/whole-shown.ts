// The API as one controller process has it, and what it has been shown there. Faults and pauses lie below it: what is checked
// here is what the process does, at the moment it does it.
//
//   J7  nobody sends a write while the Lease is another's (clocks run within the rates that the election allows for).
//   J8  nobody says Serving of an incarnation after having been shown the end of one of its pods.
import { LABELS } from "../../../../controller/api/meta.ts";
import type { KubeApi, KubeList, KubeObject, ListOptions, Resource } from "../../../../controller/kube/api/client.ts";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import { podState } from "../../../../controller/kube/groups/pod-state.ts";

/** Of a pod: its group's UID and its incarnation. */
const gangOf = ({ metadata }: KubeObject): string =>
  `${metadata.ownerReferences?.[0]?.uid}#${metadata.labels?.[LABELS.incarnation]}`;

export type ShownOptions = {
  onBroken: (text: string) => void;
  /** Whether the Lease is another's. */
  isReplaced: () => boolean;
};

export class Shown {
  /** Gangs (group's UID, incarnation) of which this process has been shown an end. */
  readonly #ended = new Set<string>();
  readonly #pods = new Map<string, KubeObject>();
  readonly #options: ShownOptions;

  constructor(options: ShownOptions) {
    this.#options = options;
  }

  over(api: KubeApi): KubeApi {
    const see = <T extends KubeObject | undefined>(resource: Resource, object: T): T => {
      if (resource.plural === "pods" && object !== undefined) this.#pod(object);
      return object;
    };
    const seen = this;
    const sent = ({ kind }: Resource, what: string): void => {
      if (kind !== "Lease" && this.#options.isReplaced())
        this.#options.onBroken(`J7: ${what} ${kind} is sent though another leads`);
    };
    return {
      serves: (...call) => api.serves(...call),
      get: async (resource, ...call) => see(resource, await api.get(resource, ...call)),
      list: async (resource, options, signal) =>
        this.#list(resource, options, await api.list(resource, options, signal)),
      create: async (resource, ...call) => {
        sent(resource, "create");
        return see(resource, await api.create(resource, ...call));
      },
      replace: async (resource, ...call) => {
        sent(resource, "replace");
        return see(resource, await api.replace(resource, ...call));
      },
      patch: async (resource, ...call) => {
        sent(resource, "patch");
        return see(resource, await api.patch(resource, ...call));
      },
      delete: (resource, ...call) => {
        sent(resource, "delete");
        return api.delete(resource, ...call);
      },
      replaceStatus: (resource, object, ...rest) => {
        sent(resource, "status");
        if (resource.plural === "replicagroups") this.#check(object);
        return api.replaceStatus(resource, object, ...rest);
      },
      watch: async function* (resource, ...call) {
        for await (const line of api.watch(resource, ...call)) {
          yield line;
          // Shown once whoever reads has taken it and asks for the next: before that it is on its way.
          if (resource.plural !== "pods" || !("object" in line)) continue;
          if (line.type === "DELETED") seen.#gone(line.object);
          else seen.#pod(line.object);
        }
      },
    };
  }

  #pod(pod: KubeObject): void {
    const { uid = "", ownerReferences, resourceVersion } = pod.metadata;
    // One without a version was created on trial: it is nowhere.
    if (ownerReferences === undefined || resourceVersion === undefined) return;
    this.#pods.set(uid, pod);
    if (podState(pod).kind === "ended") this.#ended.add(gangOf(pod));
  }

  #gone(pod: KubeObject): void {
    if (pod.metadata.ownerReferences !== undefined) this.#ended.add(gangOf(pod));
    this.#pods.delete(pod.metadata.uid ?? "");
  }

  /** One page is all there is in these clusters: what it lacks has gone. Not what was learned from a newer answer. */
  #list(resource: Resource, options: ListOptions, page: KubeList): KubeList {
    if (resource.plural !== "pods" || options.continue || page.continue) return page;
    const listed = new Set(page.items.map(({ metadata }) => metadata.uid));
    for (const pod of [...this.#pods.values()]) {
      const isAhead = Number(pod.metadata.resourceVersion) > Number(page.resourceVersion);
      if (!listed.has(pod.metadata.uid) && !isAhead) this.#gone(pod);
    }
    for (const pod of page.items) this.#pod(pod);
    return page;
  }

  /** A record of the next incarnation that carries the words of the one before says nothing new. */
  #check({ metadata, status }: KubeObject): void {
    const { phase, incarnation, record } = fieldsOf(status);
    if (phase !== "Serving" || fieldsOf(record).incarnation !== incarnation || fieldsOf(record).begun !== true) return;
    if (this.#ended.has(`${metadata.uid}#${incarnation}`))
      this.#options.onBroken(
        `J8: ${metadata.name}: Serving is said of incarnation ${incarnation}, of which an end had been shown`,
      );
  }
}
