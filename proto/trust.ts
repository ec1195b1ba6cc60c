// How processes of one installation prove to each other who they are. The seam: whoever opens or takes a link asks a Trust for
// its credentials and names whom it expects; what stands behind it (nothing on one machine, mutual TLS on a cluster) is
// decided where the process is wired.
//
//   U1  who a process is stands in one URI of its certificate, and nowhere else: names and addresses prove nothing.
//   U2  a worker is taken by a worker only from its own group of its own namespace.
//   U3  renewed material is used by every connection that begins after it, on channels and servers that live already.
import { createPrivateKey, X509Certificate } from "node:crypto";
import type { PeerCertificate } from "node:tls";
import {
  type ChannelCredentials,
  credentials,
  experimental,
  ServerCredentials,
  ServerInterceptingCall,
  type ServerInterceptor,
  ServerListenerBuilder,
  status,
} from "@grpc/grpc-js";

/** Whoever is at the other end must hold a certificate of this role and, where given, of this pod (UID) or group. */
export type Peer =
  | { role: "controller" }
  | { role: "gateway" }
  | { role: "inspect" }
  | { role: "nats" }
  | { role: "worker"; podUid?: string | undefined; namespace?: string | undefined; group?: string | undefined };

/** PEM. */
export type TlsMaterial = { ca: string; cert: string; key: string };

/** When a third of the certificate's life is left. */
export function renewalMs(cert: string): number {
  const { validFromDate, validToDate } = new X509Certificate(cert);
  return validFromDate.getTime() + ((validToDate.getTime() - validFromDate.getTime()) * 2) / 3;
}

export type Role = Peer["role"];

export interface Trust {
  /** For a gRPC channel of its own to this peer; certificates that are renewed later are used by new connections. */
  channel(peer: Peer): ChannelCredentials;
  /** For a gRPC server that takes these roles and nobody else. */
  server(from: readonly Role[]): ServerCredentials;
  /** For a NATS connection; undefined: in clear. A live view: what is renewed later is read by the next reconnect. */
  nats(): TlsMaterial | undefined;
}

/** One machine: unix sockets and loopback. */
export const noTrust: Trust = {
  channel: () => credentials.createInsecure(),
  server: () => ServerCredentials.createInsecure(),
  nats: () => undefined,
};

/** `name`: of a worker its group, of anybody else its pod or service. "inspect": a pod that looks at a source for the controller. */
export type Identity = { role: Role; namespace: string; name: string; podUid: string };

const PART = /^[A-Za-z0-9][A-Za-z0-9.-]{0,252}$/;
const ROLES: Readonly<Record<string, Role>> = {
  controller: "controller",
  gateway: "gateway",
  inspect: "inspect",
  nats: "nats",
  worker: "worker",
};

/** `muster://worker/NAMESPACE/GROUP/POD_UID`. Throws where a part would not be read back. */
export function uriOf({ role, namespace, name, podUid }: Identity): string {
  for (const [field, part] of Object.entries({ namespace, name, podUid }))
    if (!PART.test(part)) throw new Error(`identity: ${field} "${part}" cannot stand in a certificate`);
  return `muster://${role}/${namespace}/${name}/${podUid}`;
}

/**
 * From the alternative names as Node prints them ("URI:..., DNS:..."); undefined where there is not exactly one of ours. Node
 * quotes a value that has a comma, so none can pose as another.
 */
export function identityIn(names: string | undefined): Identity | undefined {
  const [uri, ...more] = (names ?? "").split(", ").filter((name) => name.startsWith("URI:muster://"));
  const [word = "", namespace, name, podUid, ...rest] = uri?.slice("URI:muster://".length).split("/") ?? [];
  const role = Object.hasOwn(ROLES, word) ? ROLES[word] : undefined;
  if (role === undefined || namespace === undefined || name === undefined || podUid === undefined) return undefined;
  if (more.length > 0 || rest.length > 0 || ![namespace, name, podUid].every((part) => PART.test(part)))
    return undefined;
  return { role, namespace, name, podUid };
}

const titleOf = ({ role, namespace, name, podUid }: Identity): string => `${role} ${namespace}/${name} (${podUid})`;

/** Who has made a call: undefined in clear. For servers whose answer depends on it. */
export function callerOf(call: {
  getAuthContext(): { sslPeerCertificate?: Pick<PeerCertificate, "subjectaltname"> };
}): Identity | undefined {
  return identityIn(call.getAuthContext().sslPeerCertificate?.subjectaltname);
}

/** Mutual TLS with what a certificate authority of the installation has issued. */
export class MutualTrust implements Trust {
  readonly #provider: Provider;
  #own: Identity;

  /** Throws as `update` does. */
  constructor(material: TlsMaterial) {
    this.#own = ownIdentity(material);
    this.#provider = new Provider(material);
  }

  /** Who this process is. */
  get identity(): Identity {
    return this.#own;
  }

  /** Takes renewed material. Throws, and changes nothing, where key and certificate do not belong together. */
  update(material: TlsMaterial): void {
    this.#own = ownIdentity(material);
    this.#provider.update(material);
  }

  channel(peer: Peer): ChannelCredentials {
    const checkServerIdentity = (_host: string, certificate: PeerCertificate): Error | undefined => {
      const found = identityIn(certificate.subjectaltname);
      const why =
        found === undefined ? "its certificate names nobody of this installation" : this.#mismatch(peer, found);
      return why === undefined ? undefined : new Error(`refused: ${why}`);
    };
    return experimental.createCertificateProviderChannelCredentials(this.#provider, this.#provider, {
      checkServerIdentity,
    });
  }

  server(from: readonly Role[]): ServerCredentials {
    const withCertificate = experimental.createCertificateProviderServerCredentials(
      this.#provider,
      this.#provider,
      true,
    );
    const why = (caller: Identity | undefined): string | undefined => {
      if (caller === undefined) return "its certificate names nobody of this installation";
      if (!from.includes(caller.role)) return `${titleOf(caller)} may not call this service`;
      return this.#isStranger(caller) ? `${titleOf(caller)} is of another group` : undefined;
    };
    return experimental.createServerCredentialsWithInterceptors(withCertificate, [guard(why)]);
  }

  /** For a server whose callers have no certificate yet: it proves itself alone, and takes none for a proof. */
  openServer(): ServerCredentials {
    return experimental.createCertificateProviderServerCredentials(this.#provider, this.#provider, false);
  }

  nats(): TlsMaterial {
    const provider = this.#provider;
    return {
      get ca() {
        return provider.material.ca;
      },
      get cert() {
        return provider.material.cert;
      },
      get key() {
        return provider.material.key;
      },
    };
  }

  #mismatch(peer: Peer, found: Identity): string | undefined {
    if (found.role !== peer.role) return `it is ${titleOf(found)}, not a ${peer.role}`;
    if (peer.role !== "worker") return undefined;
    const { podUid, namespace, group } = peer;
    const isOther = (wished: string | undefined, is: string) => wished !== undefined && wished !== is;
    if (isOther(podUid, found.podUid) || isOther(namespace, found.namespace) || isOther(group, found.name)) {
      return `it is ${titleOf(found)}, not ${[namespace, group, podUid].filter(Boolean).join(" ")}`;
    }
    return this.#isStranger(found) ? `${titleOf(found)} is of another group` : undefined;
  }

  /** U2. */
  #isStranger(other: Identity): boolean {
    if (this.#own.role !== "worker" || other.role !== "worker") return false;
    return other.namespace !== this.#own.namespace || other.name !== this.#own.name;
  }
}

/** Channel credentials for the one call that is made before there is a certificate: the server must be this role. */
export function enrolCredentials(ca: string, role: Role): ChannelCredentials {
  const checkServerIdentity = (_host: string, { subjectaltname }: PeerCertificate): Error | undefined => {
    const found = identityIn(subjectaltname);
    return found?.role === role
      ? undefined
      : new Error(`refused: it is ${found ? titleOf(found) : "nobody"}, not a ${role}`);
  };
  return credentials.createSsl(Buffer.from(ca), null, null, { checkServerIdentity });
}

function ownIdentity({ cert, key }: TlsMaterial): Identity {
  const certificate = new X509Certificate(cert);
  if (!certificate.checkPrivateKey(createPrivateKey(key))) throw new Error("the key is not that of the certificate");
  const identity = identityIn(certificate.subjectAltName);
  if (identity === undefined) throw new Error("the certificate names nobody of this installation");
  return identity;
}

/** Ends a call before its handler hears of it. */
function guard(why: (caller: Identity | undefined) => string | undefined): ServerInterceptor {
  return (_method, call) => {
    const listener = new ServerListenerBuilder()
      .withOnReceiveMetadata((metadata, next) => {
        const details = why(callerOf(call));
        if (details === undefined) next(metadata);
        else call.sendStatus({ code: status.UNAUTHENTICATED, details });
      })
      .build();
    return new ServerInterceptingCall(call, { start: (next) => next(listener) });
  };
}

type CaListener = Parameters<experimental.CertificateProvider["addCaCertificateListener"]>[0];
type IdentityListener = Parameters<experimental.CertificateProvider["addIdentityCertificateListener"]>[0];

/** What grpc-js reads material from. Listeners are told in a later turn: it is not ready for an answer while it adds one. */
class Provider implements experimental.CertificateProvider {
  readonly #ca = new Set<CaListener>();
  readonly #identity = new Set<IdentityListener>();
  #material: TlsMaterial;

  constructor(material: TlsMaterial) {
    this.#material = material;
  }

  get material(): TlsMaterial {
    return this.#material;
  }

  update(material: TlsMaterial): void {
    this.#material = material;
    for (const listener of this.#ca) this.#tellCa(listener);
    for (const listener of this.#identity) this.#tellIdentity(listener);
  }

  addCaCertificateListener(listener: CaListener): void {
    this.#ca.add(listener);
    queueMicrotask(() => this.#tellCa(listener));
  }

  removeCaCertificateListener(listener: CaListener): void {
    this.#ca.delete(listener);
  }

  addIdentityCertificateListener(listener: IdentityListener): void {
    this.#identity.add(listener);
    queueMicrotask(() => this.#tellIdentity(listener));
  }

  removeIdentityCertificateListener(listener: IdentityListener): void {
    this.#identity.delete(listener);
  }

  #tellCa(listener: CaListener): void {
    if (this.#ca.has(listener)) listener({ caCertificate: Buffer.from(this.#material.ca) });
  }

  #tellIdentity(listener: IdentityListener): void {
    const { cert, key } = this.#material;
    if (this.#identity.has(listener)) listener({ certificate: Buffer.from(cert), privateKey: Buffer.from(key) });
  }
}
