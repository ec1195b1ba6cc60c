// pvc://CLAIM/PATH - a folder or .gguf file of a persistent volume claim, as pods see it: the controller mounts the claim at a
// fixed place of the pods that read it (controller/kube/groups/pods.ts), and nobody else has it.
import { stat } from "node:fs/promises";
import { join, normalize, relative } from "node:path";
import { reject } from "../reject.ts";
import { openLocal } from "./file.ts";
import { decoded, type Source } from "./source.ts";

/** Claims are mounted below it, each under its name. */
export const CLAIMS = "/var/lib/muster/claims";

const PATTERN = /^pvc:\/\/([a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?)(?:\/(.*))?$/;

/** `path`: inside the volume, "." for all of it. Throws INVALID. */
export function parsePvc(url: string): { claim: string; path: string } {
  const [, claim, rest = ""] = PATTERN.exec(url) ?? [];
  if (claim === undefined) return reject("source", `${url}: write pvc://claim/path, such as pvc://weights/llama`);
  const path = normalize(`./${decoded(rest)}`).replace(/\/$/, "");
  if (path === ".." || path.startsWith("../")) reject("source", `${url} leads out of the volume`);
  return { claim, path };
}

export async function openPvcSource(url: string): Promise<Source> {
  const { claim, path } = parsePvc(url);
  const root = join(CLAIMS, claim);
  const found = await stat(root).catch(() => undefined);
  if (!found?.isDirectory()) reject("source", `${url} can be read in pods only, where claim ${claim} is mounted`);
  const urlFor = (inside: string) => `pvc://${claim}/${relative(root, inside).replaceAll("%", "%25")}`;
  return openLocal(join(root, path), urlFor);
}
