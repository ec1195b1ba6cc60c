// The line from the controller to the workers in their pods: gRPC to the pod's address. Owns connections and deadlines; who
// an answer must come from is checked by worker-identity.ts, so that every implementation of WorkerLinks is checked alike.
//
//   N1  one connection for each pod (by UID): an address that another pod has got since is another connection.
//   N2  a call ends within its bound; a worker that does not answer is a value, not an exception.
//   N3  a connection is opened to a worker of that pod, namespace and group, and to nobody else (Trust).
import { type ClientReadableStream, Metadata, type ServiceError } from "@grpc/grpc-js";
import {
  type LoadProgress,
  type LoadRequest,
  WorkerClient,
  type WorkerDescription,
} from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions, POD_UID_HEADER } from "../../../proto/grpc.ts";
import { noTrust, type Trust } from "../../../proto/trust.ts";
import type { WorkerName } from "../../reconcile/cluster.ts";

export const DESCRIBE_TIMEOUT_MS = 2_000;
/** Until a worker says the first word about its Load; the bytes take longer, but are not waited for. */
export const LOAD_TAKEN_TIMEOUT_MS = 10_000;

export type WorkerTarget = { name: WorkerName; uid: string; address: string };

export type DescribeAnswer =
  /** `uid`: of the pod that has answered, as it says itself; undefined where it does not. */
  { kind: "answered"; uid: string | undefined; description: WorkerDescription } | { kind: "silent"; detail: string };

export interface WorkerLinks {
  /** Never rejects. `boundMs`: by default DESCRIBE_TIMEOUT_MS. */
  describe(target: WorkerTarget, signal: AbortSignal, boundMs?: number): Promise<DescribeAnswer>;
  /** Resolves when the worker has taken it; rejects where it has not. A Load that is under way is not begun again. */
  load(target: WorkerTarget, request: LoadRequest, signal: AbortSignal): Promise<void>;
  /** Ends what goes to the pod. */
  forget(uid: string): void;
}

type Link = { client: WorkerClient; address: string; load: ClientReadableStream<LoadProgress> | undefined };

export type GrpcLinksOptions = {
  /** Default: none, in clear. */
  trust?: Trust | undefined;
  /** A worker has said something about its Load. */
  onNews: (name: WorkerName) => void;
};

export class GrpcWorkerLinks implements WorkerLinks {
  readonly #options: GrpcLinksOptions;
  readonly #links = new Map<string, Link>();

  constructor(options: GrpcLinksOptions) {
    this.#options = options;
  }

  describe(target: WorkerTarget, signal: AbortSignal, boundMs = DESCRIBE_TIMEOUT_MS): Promise<DescribeAnswer> {
    const { client } = this.#link(target);
    return new Promise((done) => {
      let uid: string | undefined;
      const call = client.describe(
        { incarnation: target.name.incarnation },
        metadataOf(target),
        { deadline: Date.now() + boundMs },
        (error: ServiceError | null, description: WorkerDescription) => {
          signal.removeEventListener("abort", cancel);
          if (error) done({ kind: "silent", detail: error.details });
          else done({ kind: "answered", uid, description });
        },
      );
      call.on("metadata", (metadata: Metadata) => {
        const [said] = metadata.get(POD_UID_HEADER);
        uid = said?.toString();
      });
      const cancel = () => call.cancel();
      signal.addEventListener("abort", cancel, { once: true });
      if (signal.aborted) cancel();
    });
  }

  async load(target: WorkerTarget, request: LoadRequest, signal: AbortSignal): Promise<void> {
    const link = this.#link(target);
    if (link.load !== undefined) return;
    const stream = link.client.load(request, metadataOf(target));
    link.load = stream;
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const cancel = () => stream.cancel();
    const bound = setTimeout(cancel, LOAD_TAKEN_TIMEOUT_MS);
    signal.addEventListener("abort", cancel, { once: true });
    const settle = () => {
      clearTimeout(bound);
      signal.removeEventListener("abort", cancel);
    };
    const heard = () => {
      settle();
      this.#options.onNews(target.name);
      resolve();
    };
    stream.on("data", heard);
    stream.on("end", heard);
    stream.on("error", (error) => {
      settle();
      link.load = undefined;
      this.#options.onNews(target.name);
      reject(error); // after it was taken this is no news: observe shows what became of the worker
    });
    await promise;
  }

  forget(uid: string): void {
    const link = this.#links.get(uid);
    if (link === undefined) return;
    this.#links.delete(uid);
    link.load?.cancel();
    link.client.close();
  }

  close(): void {
    for (const uid of [...this.#links.keys()]) this.forget(uid);
  }

  #link({ uid, address, name }: WorkerTarget): Link {
    const known = this.#links.get(uid);
    if (known?.address === address) return known;
    this.forget(uid);
    const { trust = noTrust } = this.#options;
    const [namespace, group] = name.group.split("/");
    const credentials = trust.channel({ role: "worker", podUid: uid, namespace, group });
    const link: Link = { client: new WorkerClient(address, credentials, channelOptions), address, load: undefined };
    this.#links.set(uid, link);
    return link;
  }
}

function metadataOf({ uid }: WorkerTarget): Metadata {
  const metadata = new Metadata();
  metadata.set(POD_UID_HEADER, uid);
  return metadata;
}
