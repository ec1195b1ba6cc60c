// builtin:// - the small trained models that come with the checkout. "nano-maverick" is the directory's safetensors,
// "nano-maverick-q4_k_m" the GGUF file of that name in it.
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { reject } from "../reject.ts";
import { directory } from "./file.ts";
import type { Source } from "./source.ts";

const ROOT = join(import.meta.dirname, "../../../test/models");

export async function openBuiltinSource(url: string): Promise<Source> {
  const wanted = url.slice("builtin://".length);
  const known: string[] = [];
  for (const entry of await readdir(ROOT, { withFileTypes: true })) {
    if (!entry.isDirectory()) continue;
    const path = join(ROOT, entry.name);
    known.push(entry.name);
    if (entry.name === wanted) return directory(url, path);
    for (const file of await readdir(path)) {
      if (!file.endsWith(".gguf")) continue;
      const name = file.slice(0, -".gguf".length).toLowerCase();
      known.push(name);
      if (name === wanted) return directory(url, path, file);
    }
  }
  return reject("source", `there is no built-in model "${wanted}"; there are ${known.toSorted().join(", ")}`);
}
