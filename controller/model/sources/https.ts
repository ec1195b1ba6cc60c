// https:// (and http:// on loopback) - a .gguf file, or a directory-like base with config.json and safetensors.
import { reject } from "../reject.ts";
import { checkUrl } from "./http.ts";
import { httpOptions, remoteSource } from "./remote.ts";
import { decoded, type Source, type SourceOptions } from "./source.ts";

export async function openHttpSource(text: string, options: SourceOptions): Promise<Source> {
  if (!URL.canParse(text)) reject("source", `${text} is not a URL`);
  const url = checkUrl(new URL(text));
  url.hash = "";
  const last = decoded(url.pathname.split("/").filter(Boolean).at(-1) ?? url.hostname);
  const isGguf = last.endsWith(".gguf");
  if (!isGguf && url.search) reject("source", "a query goes with a .gguf file only, not with a base of several files");
  if (!isGguf && !url.pathname.endsWith("/")) url.pathname += "/";
  const urlOf = (name: string): URL => {
    const file = new URL(encodeURIComponent(name), url);
    file.search = url.search;
    return file;
  };
  const name = isGguf ? last.slice(0, -".gguf".length) : last;
  const token = options.sourceToken ?? process.env.MUSTER_SOURCE_TOKEN;
  const http = httpOptions(options, token ? { origin: url.origin, token } : undefined);
  // The canonical URL leaves a query out: it may be a signature.
  const canonical = `${url.origin}${url.pathname}`;
  return remoteSource({ url: canonical, name, gguf: isGguf ? last : undefined, urlOf, http }, options);
}
