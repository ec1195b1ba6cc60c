// What the tests of the simulated API server share: a server, objects, failures.
import { KubeError, type KubeObject } from "../../controller/kube/api/client.ts";
import { SimApiServer } from "./api-server.ts";
import { VirtualClock } from "./virtual-clock.ts";

export const { signal } = new AbortController();
export const NS = "serving";

export function begin(options: ConstructorParameters<typeof SimApiServer>[1] = {}) {
  const time = new VirtualClock();
  return { time, server: new SimApiServer(time, options) };
}

export const podOf = (
  name: string,
  extra: Partial<KubeObject> = {},
  labels: Record<string, string> = {},
): KubeObject => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name, namespace: NS, labels },
  spec: { containers: [{ name: "worker", image: "muster" }] },
  ...extra,
});

export const deploymentOf = (spec: unknown): KubeObject => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "m", namespace: NS },
  spec,
});

export const mapOf = (name: string, data: unknown, metadata: Partial<KubeObject["metadata"]> = {}): KubeObject => ({
  apiVersion: "v1",
  kind: "ConfigMap",
  metadata: { name, namespace: NS, ...metadata },
  data,
});

export const failureOf = async (promise: Promise<unknown>): Promise<KubeError> => {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof KubeError)) throw new Error(`expected a KubeError, got ${String(error)}`);
  return error;
};
