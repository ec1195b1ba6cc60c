// A KubeApi that only a leader writes through. Owns the refusal of late writes, on both sides:
//
//   W1  a write is sent only while the term is held by one's own clock.
//   W2  a replacement names the version it replaces: what somebody has written since is not overwritten by one who was paused
//       between deciding and sending.
//   W3  a write that was sent in time but lands late is as if it had been made before the term was lost: whoever leads now
//       either sees it or is refused itself where it did not (409), and looks again.
import {
  type DeleteOptions,
  type KubeApi,
  KubeError,
  type KubeObject,
  type ListOptions,
  type PatchOptions,
  type Resource,
  titleOf,
  type WatchOptions,
  type WriteOptions,
} from "../api/client.ts";
import type { Term } from "./lease.ts";

export class FencedApi implements KubeApi {
  readonly #api: KubeApi;
  readonly #term: Pick<Term, "isHeld">;

  constructor(api: KubeApi, term: Pick<Term, "isHeld">) {
    this.#api = api;
    this.#term = term;
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

  async create(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    this.#check(resource, object.metadata);
    return this.#api.create(resource, object, signal, options);
  }

  async replace(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    this.#check(resource, object.metadata);
    return this.#api.replace(resource, versioned(resource, object), signal, options);
  }

  async replaceStatus(resource: Resource, object: KubeObject, signal: AbortSignal, options?: WriteOptions) {
    this.#check(resource, object.metadata);
    return this.#api.replaceStatus(resource, versioned(resource, object), signal, options);
  }

  async patch(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    body: unknown,
    options: PatchOptions,
    signal: AbortSignal,
  ) {
    this.#check(resource, { name, ...(namespace === undefined ? {} : { namespace }) });
    return this.#api.patch(resource, name, namespace, body, options, signal);
  }

  async delete(
    resource: Resource,
    name: string,
    namespace: string | undefined,
    options: DeleteOptions,
    signal: AbortSignal,
  ) {
    this.#check(resource, { name, ...(namespace === undefined ? {} : { namespace }) });
    return this.#api.delete(resource, name, namespace, options, signal);
  }

  #check(resource: Resource, { name, namespace }: { name: string; namespace?: string }): void {
    if (this.#term.isHeld()) return;
    const title = titleOf(resource, name, namespace);
    throw new KubeError(0, "NotLeader", `${title} is not written: this process does not lead any more`);
  }
}

function versioned(resource: Resource, object: KubeObject): KubeObject {
  const { name, namespace, resourceVersion } = object.metadata;
  if (!resourceVersion)
    throw new Error(`${titleOf(resource, name, namespace)}: a leader's write needs its resourceVersion`);
  return object;
}
