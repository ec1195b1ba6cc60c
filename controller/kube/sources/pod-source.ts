// What a pod is given so that it can read a model's source: the claim that it lies on, and the secret that opens it. Pure. Owns
// the names in the container; the controller itself reads no claim's files and no user's Secret.
import { CLAIMS } from "../../model/sources/pvc.ts";
import { claimOf } from "./volumes.ts";

export type PodSource = { url: string; secret: { name: string; key: string } | undefined };

const VOLUME = "claim";

/** Read-only: nothing of Muster writes where models lie. */
export function sourceVolumes(source: PodSource | undefined): unknown[] {
  const claim = source && claimOf(source.url);
  if (claim === undefined) return [];
  return [{ name: VOLUME, persistentVolumeClaim: { claimName: claim, readOnly: true } }];
}

export function sourceMounts(source: PodSource | undefined): unknown[] {
  const claim = source && claimOf(source.url);
  return claim === undefined ? [] : [{ name: VOLUME, mountPath: `${CLAIMS}/${claim}`, readOnly: true }];
}

/** As controller/model reads them: the hub has a token of its own, every other server takes one as bearer. */
export function sourceEnv(source: PodSource | undefined): { name: string; valueFrom: unknown }[] {
  if (source?.secret === undefined) return [];
  const { name, key } = source.secret;
  const variable = source.url.startsWith("hf://") ? "HF_TOKEN" : "MUSTER_SOURCE_TOKEN";
  return [{ name: variable, valueFrom: { secretKeyRef: { name, key } } }];
}
