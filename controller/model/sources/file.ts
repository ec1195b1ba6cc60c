// file:// - a directory with config.json and safetensors, or one .gguf file. Also what builtin:// leads to.
import { readdir, stat } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { fileSource } from "../byte-source.ts";
import { reject } from "../reject.ts";
import { decoded, type Source } from "./source.ts";

/** Files of a model directory that are looked at; more are somebody's home directory. */
const ENTRIES_MAX = 10_000;

/** The path of a file:// URL: absolute, or relative to the working directory as `file://./dir`. */
export function pathOf(url: string): string {
  const rest = url.slice("file://".length);
  if (rest === "") reject("source", `${url} names no path`);
  const path = decoded(rest);
  if (!path.startsWith("/") && !path.startsWith("./") && !path.startsWith("../"))
    reject("source", `${url}: write file:///absolute/path or file://./relative/path`);
  return resolve(path);
}

/** The canonical URL: reading it leads to the same path. */
const urlOf = (path: string): string => `file://${path.replaceAll("%", "%25")}`;

export async function openFileSource(url: string): Promise<Source> {
  return openLocal(pathOf(url), urlOf);
}

/** A directory, its config.json, or a .gguf file. `urlFor`: the canonical URL of such a path. */
export async function openLocal(path: string, urlFor: (path: string) => string): Promise<Source> {
  const found = await stat(path).catch(() => undefined);
  if (!found) reject("source", `${path} does not exist`);
  if (found.isDirectory()) return directory(urlFor(path), path);
  if (path.endsWith(".gguf")) return directory(urlFor(path), dirname(path), basename(path));
  if (basename(path) === "config.json") return directory(urlFor(dirname(path)), dirname(path));
  return reject("source", `${path} is neither a directory nor a .gguf file`);
}

export function directory(url: string, path: string, gguf?: string): Source {
  const inside = (name: string): string => {
    if (name.includes("/") || name.includes("\\") || name === "..") reject("source", `${name} is not a file name`);
    return join(path, name);
  };
  return {
    url,
    name: gguf ? basename(gguf, ".gguf") : basename(path),
    gguf,
    remote: false,
    listGguf: async () => {
      const names = await readdir(path);
      if (names.length > ENTRIES_MAX) reject("source", `${path} has ${names.length} files, more than ${ENTRIES_MAX}`);
      return names.filter((name) => name.endsWith(".gguf")).toSorted();
    },
    open: (name) => fileSource(inside(name), name),
    fetch: async (names) => names.map(inside),
  };
}
