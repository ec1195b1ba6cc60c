// A KubeApi whose process dies after its n-th write, or has its calls counted. After the death no call ever comes back.
import type {
  DeleteOptions,
  KubeApi,
  KubeObject,
  ListOptions,
  PatchOptions,
  Resource,
  WatchOptions,
  WriteOptions,
} from "../../../controller/kube/api/client.ts";

/** Leases are the election's own, events are best effort. */
const isCounted = ({ kind }: Resource): boolean => kind !== "Lease" && kind !== "Event";

export class CrashingApi implements KubeApi {
  readonly writes: string[] = [];
  isDead = false;
  readonly #api: KubeApi;
  readonly #dieAfter: number;
  readonly #onDeath: () => void;

  constructor(api: KubeApi, dieAfter: number, onDeath: () => void) {
    this.#api = api;
    this.#dieAfter = dieAfter;
    this.#onDeath = onDeath;
  }

  get(resource: Resource, name: string, namespace: string | undefined, signal: AbortSignal) {
    return this.#alive(() => this.#api.get(resource, name, namespace, signal));
  }

  list(resource: Resource, options: ListOptions, signal: AbortSignal) {
    return this.#alive(() => this.#api.list(resource, options, signal));
  }

  watch(resource: Resource, options: WatchOptions, signal: AbortSignal) {
    return this.#api.watch(resource, options, signal);
  }

  serves(resource: Resource, signal: AbortSignal) {
    return this.#alive(() => this.#api.serves(resource, signal));
  }

  create(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    const title = `create ${resource.plural}`;
    return this.#write(resource, title, () => this.#api.create(resource, object, signal, options));
  }

  replace(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#write(resource, "replace", () => this.#api.replace(resource, object, signal, options));
  }

  replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    const title = `status ${resource.plural}`;
    return this.#write(resource, title, () => this.#api.replaceStatus(resource, object, signal, options));
  }

  patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ) {
    const title = `${options.type} ${resource.plural}`;
    return this.#write(resource, title, () => this.#api.patch(resource, name, namespace, body, options, signal));
  }

  delete(resource: Resource, name: string, namespace: string | undefined, options: DeleteOptions, signal: AbortSignal) {
    const title = `delete ${resource.plural}`;
    return this.#write(resource, title, () => this.#api.delete(resource, name, namespace, options, signal));
  }

  async #write<T>(resource: Resource, title: string, work: () => Promise<T>): Promise<T> {
    const answer = await this.#alive(work);
    if (!isCounted(resource)) return answer;
    this.writes.push(title);
    if (this.writes.length < this.#dieAfter) return answer;
    this.isDead = true;
    this.#onDeath();
    return new Promise<never>(() => {});
  }

  #alive<T>(work: () => Promise<T>): Promise<T> {
    return this.isDead ? new Promise<never>(() => {}) : work();
  }
}
