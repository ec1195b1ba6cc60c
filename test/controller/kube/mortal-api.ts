// A KubeApi whose process dies at one of its writes: the crash points of a controller. Owns the count, not the death.
import {
  type DeleteOptions,
  type KubeApi,
  KubeError,
  type KubeObject,
  type ListOptions,
  type PatchOptions,
  type Resource,
  type WatchOptions,
  type WriteOptions,
} from "../../../controller/kube/api/client.ts";

/** Where a controller dies: at its nth write, before it is sent or after it has happened. */
export type CrashPoint = { write: number; when: "before" | "after" };

/** Counts writes; its process dies at one of them. */
export class MortalApi implements KubeApi {
  readonly #api: KubeApi;
  readonly #fate: { crash: CrashPoint | undefined; writes: string[]; die: () => void };
  #count = 0;

  constructor(api: KubeApi, fate: { crash: CrashPoint | undefined; writes: string[]; die: () => void }) {
    this.#api = api;
    this.#fate = fate;
  }

  get(resource: Resource, name: string, namespace: string | undefined, signal: AbortSignal) {
    return this.#api.get(resource, name, namespace, signal);
  }
  list(resource: Resource, options: ListOptions, signal: AbortSignal) {
    return this.#api.list(resource, options, signal);
  }
  watch(resource: Resource, options: WatchOptions, signal: AbortSignal) {
    return this.#api.watch(resource, options, signal);
  }
  serves(resource: Resource, signal: AbortSignal) {
    return this.#api.serves(resource, signal);
  }
  create(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    const run = () => this.#api.create(resource, object, signal, options);
    return options?.dryRun === true ? run() : this.#write(`create ${object.metadata.name}`, run);
  }
  replace(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#write(`replace ${object.metadata.name}`, () => this.#api.replace(resource, object, signal, options));
  }
  replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    return this.#write(`record ${object.metadata.name}`, () =>
      this.#api.replaceStatus(resource, object, signal, options),
    );
  }
  patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ) {
    const what = options.type === "apply" ? `apply ${resource.plural}/${name}` : `open ${name}`;
    return this.#write(what, () => this.#api.patch(resource, name, namespace, body, options, signal));
  }
  delete(resource: Resource, name: string, namespace: string | undefined, options: DeleteOptions, signal: AbortSignal) {
    return this.#write(`delete ${name}`, () => this.#api.delete(resource, name, namespace, options, signal));
  }

  async #write<T>(what: string, run: () => Promise<T>): Promise<T> {
    const { crash, writes, die } = this.#fate;
    const isLast = crash?.write === this.#count++;
    writes.push(what);
    if (isLast && crash.when === "before") this.#end(die);
    const answer = await run();
    if (isLast) this.#end(die);
    return answer;
  }

  #end(die: () => void): never {
    die();
    throw new KubeError(0, "Dead", "the controller has died");
  }
}
