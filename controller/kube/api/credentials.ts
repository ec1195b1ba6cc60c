// Who we are to which API server: address, TLS material and headers, from a kubeconfig or from inside a pod. Owns nothing that
// lives: files and tokens that rotate are read anew at each `load`. @kubernetes/client-node is used for this alone, and loaded
// here alone: it costs about a second and 70 MB, and its clients open a connection for every request.
import { KubeError } from "./client.ts";
import { isRecord } from "./wire.ts";

export type TlsMaterial = {
  ca?: string | Buffer;
  cert?: string | Buffer;
  key?: string | Buffer;
  servername?: string;
  rejectUnauthorized?: boolean;
};

export type Access = {
  /** With the path before /api, where a proxy has one. */
  server: URL;
  headers: Readonly<Record<string, string>>;
  tls: TlsMaterial;
};

export interface Credentials {
  /** Throws a KubeError where they cannot be read. */
  load(): Promise<Access>;
  /** Where the context says it; else "default". */
  namespace(): Promise<string>;
}

/** `path`: a kubeconfig; left out: KUBECONFIG, ~/.kube/config, or the service account of this pod, whichever is there first. */
export function kubeconfigCredentials(options: { path?: string; context?: string } = {}): Credentials {
  const opened = Promise.withResolvers<Awaited<ReturnType<typeof openConfig>>>();
  opened.promise.catch(() => {});
  let isOpening = false;
  const open = () => {
    if (!isOpening) openConfig(options).then(opened.resolve, opened.reject);
    isOpening = true;
    return opened.promise;
  };
  return {
    load: async () => accessOf(await open()),
    namespace: async () => {
      const config = await open();
      return config.getContextObject(config.getCurrentContext())?.namespace ?? "default";
    },
  };
}

async function openConfig(options: { path?: string; context?: string }) {
  const { KubeConfig } = await import("@kubernetes/client-node");
  const config = new KubeConfig();
  try {
    if (options.path === undefined) config.loadFromDefault();
    else config.loadFromFile(options.path);
  } catch (cause) {
    throw credentialsError(`the kubeconfig${options.path ? ` ${options.path}` : ""} cannot be read`, cause);
  }
  if (options.context !== undefined) {
    const names = config.getContexts().map(({ name }) => name);
    if (!names.includes(options.context)) {
      throw credentialsError(`the kubeconfig has no context "${options.context}"; it has ${names.join(", ")}`);
    }
    config.setCurrentContext(options.context);
  }
  return config;
}

async function accessOf(config: Awaited<ReturnType<typeof openConfig>>): Promise<Access> {
  const cluster = config.getCurrentCluster();
  if (!cluster) throw credentialsError(`the kubeconfig's context "${config.getCurrentContext()}" names no cluster`);
  if (cluster.proxyUrl)
    throw credentialsError("the kubeconfig's proxy-url is not supported: reach the API server directly");
  const server = serverOf(cluster.server);
  const filled: Record<string, unknown> & { headers: Record<string, unknown> } = { headers: {} };
  // The library makes an agent that is never used; it refuses http:// unless TLS is not verified, which says nothing here.
  const plain = server.protocol === "http:" ? { ...cluster, skipTLSVerify: true } : cluster;
  config.clusters = config.clusters.map((one) => (one.name === cluster.name ? plain : one));
  try {
    await config.applyToHTTPSOptions(filled);
  } catch (cause) {
    throw credentialsError("the credentials of the kubeconfig cannot be read", cause);
  }
  return { server, headers: headersOf(filled), tls: tlsOf(filled) };
}

function serverOf(text: string): URL {
  if (!URL.canParse(text)) throw credentialsError(`the kubeconfig's server "${text}" is no URL`);
  return new URL(text);
}

function headersOf(filled: Record<string, unknown>): Record<string, string> {
  const given = isRecord(filled.headers) ? filled.headers : {};
  const headers = Object.fromEntries(
    Object.entries(given).map(([name, value]) => [name.toLowerCase(), String(value).trim()]),
  );
  if (typeof filled.auth === "string") headers.authorization = `Basic ${Buffer.from(filled.auth).toString("base64")}`;
  return headers;
}

function tlsOf(filled: Record<string, unknown>): TlsMaterial {
  const tls: TlsMaterial = {};
  for (const name of ["ca", "cert", "key"] as const) {
    const value = filled[name];
    if (typeof value === "string" || Buffer.isBuffer(value)) tls[name] = value;
  }
  if (typeof filled.servername === "string") tls.servername = filled.servername;
  if (typeof filled.rejectUnauthorized === "boolean") tls.rejectUnauthorized = filled.rejectUnauthorized;
  return tls;
}

const credentialsError = (message: string, cause?: unknown): KubeError =>
  new KubeError(0, "Credentials", cause === undefined ? message : `${message}: ${String(cause)}`, { cause });
