// Volumes of a pod as folders: made before its containers start, refreshed while it runs, removed with its folder.
// Owns the files' content. Where they appear in a container is the sandbox's business (sandbox.ts).
//
//   V1  a projected file is replaced whole (written beside and renamed): a reader never sees half of a token.
import { existsSync, mkdirSync, renameSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { z } from "zod";
import type { RawApi } from "../controlplane/raw-api.ts";
import { dataOf, fieldOf, NotThere, type Place } from "./environment.ts";
import type { Pod, Projection, Volume } from "./pod.ts";
import { certificateOf } from "./pod-certificate.ts";

const TokenRequest = z.looseObject({ status: z.looseObject({ token: z.string(), expirationTimestamp: z.string() }) });
const TOKEN_SECONDS_MIN = 600; // the API server refuses less

const Claim = z.looseObject({
  spec: z.looseObject({ volumeName: z.string().default("") }).default({ volumeName: "" }),
});
const Folder = z.looseObject({ path: z.string() }).optional();
const PersistentVolume = z.looseObject({ spec: z.looseObject({ hostPath: Folder, local: Folder }) });

export type Made = { folder: string; refreshAtMs: number | undefined };
type Site = { api: RawApi; pod: Pod; place: Place };
type Files = { content: Map<string, Buffer>; refreshAtMs: number | undefined };
type Source = { name: string; items?: { key: string; path: string }[] | undefined; optional: boolean };

/** Makes or refreshes a volume in `folder`; says when a token in it should be drawn anew. */
export async function makeVolume(site: Site, volume: Volume, folder: string): Promise<Made> {
  if (volume.hostPath) return { folder: volume.hostPath.path, refreshAtMs: undefined };
  if (volume.persistentVolumeClaim) {
    const lies = await claimed(site, volume.persistentVolumeClaim);
    if (!existsSync(folder)) {
      mkdirSync(dirname(folder), { recursive: true });
      symlinkSync(lies, folder);
    }
    return { folder, refreshAtMs: undefined };
  }
  mkdirSync(folder, { recursive: true, mode: 0o777 });
  if (volume.emptyDir) return { folder, refreshAtMs: undefined };
  const files = await filesOf(site, volume);
  for (const [path, content] of files.content) replaceFile(join(folder, normalize(`/${path}`)), content);
  return { folder, refreshAtMs: files.refreshAtMs };
}

/** The folder of a claim's volume, which lies on this machine. */
async function claimed({ api, pod }: Site, { claimName }: { claimName: string }): Promise<string> {
  const claim = await api.find(`/api/v1/namespaces/${pod.metadata.namespace}/persistentvolumeclaims/${claimName}`);
  const { volumeName } = Claim.parse(claim ?? {}).spec;
  if (volumeName === "") throw new NotThere(`persistentvolumeclaim "${claimName}" is not bound`);
  const { spec } = PersistentVolume.parse(await api.find(`/api/v1/persistentvolumes/${volumeName}`));
  const folder = spec.hostPath?.path ?? spec.local?.path;
  if (folder === undefined) throw new NotThere(`volume ${volumeName}: a kind that the process kubelet does not have`);
  return folder;
}

async function filesOf(site: Site, volume: Volume): Promise<Files> {
  const { configMap, secret, downwardAPI, projected } = volume;
  if (configMap) return await project(site, { configMap });
  if (secret) return await project(site, { secret: { ...secret, name: secret.secretName } });
  if (downwardAPI) return await project(site, { downwardAPI });
  if (!projected) throw new NotThere(`volume ${volume.name}: a kind that the process kubelet does not have`);
  const all: Files = { content: new Map(), refreshAtMs: undefined };
  for (const source of projected.sources) {
    const { content, refreshAtMs } = await project(site, source);
    for (const [path, bytes] of content) all.content.set(path, bytes);
    all.refreshAtMs = Math.min(all.refreshAtMs ?? Infinity, refreshAtMs ?? Infinity);
    if (all.refreshAtMs === Infinity) all.refreshAtMs = undefined;
  }
  return all;
}

async function project(site: Site, source: Projection): Promise<Files> {
  const { pod, place } = site;
  if (source.configMap) return await keysOf(site, "configmaps", source.configMap);
  if (source.secret) return await keysOf(site, "secrets", source.secret);
  if (source.serviceAccountToken) return await tokenOf(site, source.serviceAccountToken);
  if (source.podCertificate) {
    const { bundle, refreshAtMs } = await certificateOf(site, source.podCertificate);
    return { content: new Map([[source.podCertificate.credentialBundlePath, bundle]]), refreshAtMs };
  }
  const items = source.downwardAPI?.items ?? [];
  const fields = items.map(({ path, fieldRef }): [string, Buffer] => [
    path,
    Buffer.from(fieldOf(pod, fieldRef?.fieldPath ?? "", place)),
  ]);
  return { content: new Map(fields), refreshAtMs: undefined };
}

async function keysOf(site: Site, kind: "configmaps" | "secrets", source: Source): Promise<Files> {
  const data = await dataOf(site.api, { kind, namespace: site.pod.metadata.namespace, name: source.name });
  if (!data && !source.optional) throw new NotThere(`${kind.slice(0, -1)} "${source.name}" not found`);
  const all = data ?? new Map<string, Buffer>();
  if (!source.items) return { content: all, refreshAtMs: undefined };
  const content = new Map<string, Buffer>();
  for (const { key, path } of source.items) {
    const value = all.get(key);
    if (value) content.set(path, value);
    else if (!source.optional) throw new NotThere(`references non-existent key ${key} of "${source.name}"`);
  }
  return { content, refreshAtMs: undefined };
}

/** A token bound to this pod, drawn from the API server; due again at 80% of its life, as kubelets do. */
async function tokenOf(
  { api, pod }: Site,
  wanted: { audience: string; expirationSeconds: number; path: string },
): Promise<Files> {
  const { name, namespace, uid } = pod.metadata;
  const answer = await api.ask({
    method: "POST",
    path: `/api/v1/namespaces/${namespace}/serviceaccounts/${pod.spec.serviceAccountName}/token`,
    body: {
      apiVersion: "authentication.k8s.io/v1",
      kind: "TokenRequest",
      spec: {
        ...(wanted.audience ? { audiences: [wanted.audience] } : {}),
        expirationSeconds: Math.max(TOKEN_SECONDS_MIN, wanted.expirationSeconds),
        boundObjectRef: { apiVersion: "v1", kind: "Pod", name, uid },
      },
    },
  });
  const { status } = TokenRequest.parse(answer);
  const lifeMs = Date.parse(status.expirationTimestamp) - Date.now();
  return { content: new Map([[wanted.path, Buffer.from(status.token)]]), refreshAtMs: Date.now() + 0.8 * lifeMs };
}

function replaceFile(path: string, content: Buffer): void {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(`${path}.new`, content, { mode: 0o644 });
  renameSync(`${path}.new`, path);
}
