// Claims of a bed: a persistent volume that is a folder of this machine, with nano-maverick in it.
import { copyFileSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import type { Bed } from "./bed.ts";

const MODEL = join(import.meta.dirname, "../../models/nano-maverick");
const CORE = "/api/v1/namespaces/default";

/** A claim bound to a folder of this machine with the model at models/nano, mounted on these nodes only. */
export async function makeClaim(bed: Bed, name: string, hosts: readonly string[]): Promise<void> {
  const path = join(bed.plane.dir, `volume-${name}`);
  mkdirSync(join(path, "models/nano"), { recursive: true });
  for (const file of ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    copyFileSync(join(MODEL, file), join(path, "models/nano", file));
  const terms = [{ matchExpressions: [{ key: "kubernetes.io/hostname", operator: "In", values: hosts }] }];
  await bed.make("/api/v1/persistentvolumes", {
    apiVersion: "v1",
    kind: "PersistentVolume",
    metadata: { name },
    spec: {
      capacity: { storage: "1Gi" },
      accessModes: ["ReadOnlyMany"],
      storageClassName: "",
      claimRef: { namespace: "default", name },
      local: { path },
      nodeAffinity: { required: { nodeSelectorTerms: terms } },
    },
  });
  await bed.make(`${CORE}/persistentvolumeclaims`, {
    apiVersion: "v1",
    kind: "PersistentVolumeClaim",
    metadata: { name },
    spec: {
      accessModes: ["ReadOnlyMany"],
      storageClassName: "",
      volumeName: name,
      resources: { requests: { storage: "1Gi" } },
    },
  });
}
