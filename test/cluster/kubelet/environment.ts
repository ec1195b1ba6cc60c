// The environment of a container: what its spec says, resolved against the pod, ConfigMaps and Secrets.
// Owns the order (envFrom, then env, later wins) and $(NAME) expansion as the API documents it.
import { z } from "zod";
import type { RawApi } from "../controlplane/raw-api.ts";
import type { Container, Pod } from "./pod.ts";

const Data = z.looseObject({
  data: z.record(z.string(), z.string()).default({}),
  binaryData: z.record(z.string(), z.string()).default({}),
});

/** Where a pod runs: what only the kubelet knows. */
export type Place = { ip: string; hostIp: string; node: string };

/** Something that the pod names is not there (yet): the container waits with this reason, as with a real kubelet. */
export class NotThere extends Error {}

/** Keys and bytes of a ConfigMap or Secret; undefined where it is not there. */
export async function dataOf(
  api: RawApi,
  what: { kind: "configmaps" | "secrets"; namespace: string; name: string },
): Promise<Map<string, Buffer> | undefined> {
  const found = await api.find(`/api/v1/namespaces/${what.namespace}/${what.kind}/${what.name}`);
  if (found === undefined) return undefined;
  const { data, binaryData } = Data.parse(found);
  const encoding = what.kind === "secrets" ? "base64" : "utf8";
  const plain = Object.entries(data).map(([key, value]): [string, Buffer] => [key, Buffer.from(value, encoding)]);
  const binary = Object.entries(binaryData).map(([key, value]): [string, Buffer] => [
    key,
    Buffer.from(value, "base64"),
  ]);
  return new Map([...plain, ...binary]);
}

/** The environment without $(NAME) of outside: only what the spec and the kubelet give. */
export async function environmentOf(
  api: RawApi,
  pod: Pod,
  container: Container,
  place: Place,
): Promise<Record<string, string>> {
  const { namespace } = pod.metadata;
  const env: Record<string, string> = {};
  const source = async (kind: "configmaps" | "secrets", ref: { name: string; optional: boolean }) => {
    const data = await dataOf(api, { kind, namespace, name: ref.name });
    if (!data && !ref.optional) throw new NotThere(`${kind.slice(0, -1)} "${ref.name}" not found`);
    return data ?? new Map<string, Buffer>();
  };
  for (const from of container.envFrom) {
    for (const [kind, ref] of [["configmaps", from.configMapRef] as const, ["secrets", from.secretRef] as const]) {
      if (!ref) continue;
      for (const [key, value] of await source(kind, ref)) env[`${from.prefix}${key}`] = value.toString();
    }
  }
  for (const { name, value, valueFrom } of container.env) {
    if (!valueFrom) {
      env[name] = expand(value ?? "", env);
    } else if (valueFrom.fieldRef) {
      env[name] = fieldOf(pod, valueFrom.fieldRef.fieldPath, place);
    } else if (valueFrom.resourceFieldRef) {
      env[name] = quantityOf(container, valueFrom.resourceFieldRef.resource);
    } else {
      const ref = valueFrom.configMapKeyRef ?? valueFrom.secretKeyRef;
      if (!ref) throw new NotThere(`env ${name}: a source that the process kubelet does not know`);
      const kind = valueFrom.configMapKeyRef ? "configmaps" : "secrets";
      const found = (await source(kind, ref)).get(ref.key);
      if (found) env[name] = found.toString();
      else if (!ref.optional) throw new NotThere(`couldn't find key ${ref.key} in ${kind.slice(0, -1)} ${ref.name}`);
    }
  }
  return env;
}

/** $(NAME) becomes its value, $$(NAME) a literal $(NAME), an unknown name stays as it is. */
export function expand(text: string, env: Record<string, string>): string {
  return text.replace(/\$\$|\$\(([A-Za-z_][\w.-]*)\)/g, (whole, name: string | undefined) =>
    name === undefined ? "$" : (env[name] ?? whole),
  );
}

/** A field of the downward API. Throws NotThere for one that it does not have. */
export function fieldOf(pod: Pod, path: string, place: Place): string {
  const keyed = /^metadata\.(labels|annotations)\['(.+)'\]$/.exec(path);
  if (keyed?.[1] === "labels") return pod.metadata.labels[keyed[2] ?? ""] ?? "";
  if (keyed?.[1] === "annotations") return pod.metadata.annotations[keyed[2] ?? ""] ?? "";
  const lines = (map: Record<string, string>) =>
    Object.entries(map)
      .map(([key, value]) => `${key}=${JSON.stringify(value)}`)
      .join("\n");
  const fields: Record<string, string> = {
    "metadata.name": pod.metadata.name,
    "metadata.namespace": pod.metadata.namespace,
    "metadata.uid": pod.metadata.uid,
    "metadata.labels": lines(pod.metadata.labels),
    "metadata.annotations": lines(pod.metadata.annotations),
    "spec.nodeName": place.node,
    "spec.serviceAccountName": pod.spec.serviceAccountName,
    "status.podIP": place.ip,
    "status.podIPs": place.ip,
    "status.hostIP": place.hostIp,
    "status.hostIPs": place.hostIp,
  };
  const found = fields[path];
  if (found === undefined) throw new NotThere(`the downward API has no field ${path}`);
  return found;
}

/** `limits.memory` of a container as a plain number; whole units are rounded up. */
function quantityOf(container: Container, resource: string): string {
  const [list, ...name] = resource.split(".");
  const from = list === "limits" ? container.resources.limits : container.resources.requests;
  const [, number = "0", unit = ""] = /^([\d.]+)(\w*)$/.exec(from[name.join(".")] ?? "0") ?? [];
  const scales: Record<string, number> = {
    m: 1e-3,
    k: 1e3,
    M: 1e6,
    G: 1e9,
    T: 1e12,
    Ki: 2 ** 10,
    Mi: 2 ** 20,
    Gi: 2 ** 30,
  };
  return String(Math.ceil(Number(number) * (scales[unit] ?? 1)));
}
