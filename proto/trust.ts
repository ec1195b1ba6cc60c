// How processes of one installation prove to each other who they are. The seam: whoever opens or takes a link asks a Trust for
// its credentials and names whom it expects; what stands behind it (nothing on one machine, mutual TLS on a cluster) is
// decided where the process is wired.
import { type ChannelCredentials, credentials, ServerCredentials } from "@grpc/grpc-js";

/** Whoever is at the other end must hold a certificate of this role and, where given, of this pod (UID) or group. */
export type Peer =
  | { role: "controller" }
  | { role: "gateway" }
  | { role: "nats" }
  | { role: "worker"; podUid?: string | undefined; namespace?: string | undefined; group?: string | undefined };

/** PEM. */
export type TlsMaterial = { ca: string; cert: string; key: string };

export type Role = Peer["role"];

export interface Trust {
  /** For a gRPC channel of its own to this peer; certificates that are renewed later are used by new connections. */
  channel(peer: Peer): ChannelCredentials;
  /** For a gRPC server that takes these roles and nobody else. */
  server(from: readonly Role[]): ServerCredentials;
  /** For a NATS connection; undefined: in clear. */
  nats(): TlsMaterial | undefined;
}

/** One machine: unix sockets and loopback. */
export const noTrust: Trust = {
  channel: () => credentials.createInsecure(),
  server: () => ServerCredentials.createInsecure(),
  nats: () => undefined,
};
