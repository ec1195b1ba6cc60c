// Authorities, certificates and gRPC servers for tests of trust: all real, on loopback.
import {
  type ChannelCredentials,
  credentials,
  Metadata,
  Server,
  type ServerCredentials,
  type ServiceError,
} from "@grpc/grpc-js";
import { onTestFinished } from "vitest";
import { type Authority, LEAF_MS, makeAuthority, makeLeaf } from "../../controller/kube/trust/authority.ts";
import { WorkerClient, type WorkerDescription, WorkerService } from "../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../proto/grpc.ts";
import { type Identity, MutualTrust, type TlsMaterial } from "../../proto/trust.ts";
import { describe } from "../controller/reconcile/groups.ts";

const CALL_MS_MAX = 10_000;

export const controller: Identity = {
  role: "controller",
  namespace: "muster",
  name: "muster-controller-1",
  podUid: "c-1",
};
export const gateway: Identity = { role: "gateway", namespace: "muster", name: "muster-gateway-1", podUid: "g-1" };
export const workerOf = (group: string, podUid: string, namespace = "models"): Identity => ({
  role: "worker",
  namespace,
  name: group,
  podUid,
});

export const authorityNow = (): Promise<Authority> => makeAuthority(Date.now());

/** `ageMs`: how long ago it was issued; older than a day has expired. */
export async function materialOf(authority: Authority, identity: Identity, ageMs = 0): Promise<TlsMaterial> {
  const nowMs = Date.now() - ageMs;
  return await makeLeaf(
    authority,
    { identity, dns: ["localhost"], ips: ["127.0.0.1"], notAfterMs: nowMs + LEAF_MS },
    nowMs,
  );
}

export const trustOf = async (authority: Authority, identity: Identity): Promise<MutualTrust> =>
  new MutualTrust(await materialOf(authority, identity));

/** A worker's server that describes itself to whoever is let in; answers its address. */
export async function serve(own: ServerCredentials, onCall: () => void = () => {}): Promise<string> {
  const server = new Server();
  server.addService(WorkerService, {
    describe: (_: unknown, answer: (error: null, value: WorkerDescription) => void) => {
      onCall();
      answer(null, describe(0));
    },
  });
  const port = await new Promise<number>((done, fail) =>
    server.bindAsync("127.0.0.1:0", own, (error, bound) => (error ? fail(error) : done(bound))),
  );
  onTestFinished(() => server.forceShutdown());
  return `127.0.0.1:${port}`;
}

export function clientOf(address: string, own: ChannelCredentials): WorkerClient {
  // Of its own: the library would share connections between channels that say the same.
  const client = new WorkerClient(address, own, { ...channelOptions, "grpc.use_local_subchannel_pool": 1 });
  onTestFinished(() => client.close());
  return client;
}

/** "ok", or what the call ended with. */
export function outcome(client: WorkerClient): Promise<{ code: number; details: string } | "ok"> {
  return new Promise((done) => {
    const bound = { deadline: Date.now() + CALL_MS_MAX };
    client.describe({ incarnation: 1n }, new Metadata(), bound, (error: ServiceError | null) =>
      done(error === null ? "ok" : { code: error.code, details: error.details }),
    );
  });
}

export const ask = (address: string, own: ChannelCredentials) => outcome(clientOf(address, own));

/** TLS without a certificate of one's own. */
export const anonymous = (ca: string): ChannelCredentials =>
  credentials.createSsl(Buffer.from(ca), null, null, { checkServerIdentity: () => undefined });
