// What several tests of controller/kube need: a server behind real sockets, a client of it, objects.
import { onTestFinished } from "vitest";
import type { KubeApi, KubeObject, Resource } from "../../../controller/kube/api/client.ts";
import { KubeError } from "../../../controller/kube/api/client.ts";
import { Connections } from "../../../controller/kube/api/connections.ts";
import type { Access, Credentials } from "../../../controller/kube/api/credentials.ts";
import { type HttpApiOptions, HttpKubeApi } from "../../../controller/kube/api/http-api.ts";
import * as known from "../../../controller/kube/api/resources.ts";
import { type HttpServerOptions, SimHttpServer } from "../../sim/http-server.ts";

export const NS = "serving";

export const resources: readonly Resource[] = Object.values(known).filter((value) => typeof value === "object");

export async function serve(api: KubeApi, options: Partial<HttpServerOptions> = {}): Promise<SimHttpServer> {
  const server = await SimHttpServer.listen(api, { resources, ...options });
  onTestFinished(() => server.close());
  return server;
}

export function fixedCredentials(access: Partial<Access> & { server: URL }): Credentials {
  return {
    load: async () => ({ headers: {}, tls: {}, ...access }),
    namespace: async () => "default",
  };
}

export function clientOf(url: string, options: Partial<HttpApiOptions> = {}): HttpKubeApi {
  const connections = options.connections ?? new Connections(fixedCredentials({ server: new URL(url) }));
  onTestFinished(() => connections.close());
  return new HttpKubeApi({ random: () => 0, ...options, connections });
}

export const mapOf = (name: string, data: unknown = {}, labels: Record<string, string> = {}): KubeObject => ({
  apiVersion: "v1",
  kind: "ConfigMap",
  metadata: { name, namespace: NS, ...(Object.keys(labels).length > 0 ? { labels } : {}) },
  data,
});

export async function failureOf(promise: Promise<unknown>): Promise<KubeError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof KubeError)) throw new Error(`expected a KubeError, got ${String(error)}`);
  return error;
}
