// hf://org/name@rev[/file.gguf] - a repository of the Hugging Face hub, or of the server that HF_ENDPOINT names. A branch is
// replaced by the commit it stands for, so that all files are of one state.
import { reject } from "../reject.ts";
import { checkUrl } from "./http.ts";
import { blobsOf, httpOptions, isOffline, notCached, type Place, remoteSource } from "./remote.ts";
import { probe } from "./remote-file.ts";
import type { Source, SourceOptions } from "./source.ts";

type Address = { repository: string; revision: string; gguf: string | undefined };

const ENDPOINT = "https://huggingface.co";
const PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}";
const PATTERN = new RegExp(`^hf://(${PART}/${PART})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,127}))?(?:/([^/]+\\.gguf))?$`);

export function parseHf(text: string): Address {
  const match = PATTERN.exec(text);
  const repository = match?.[1];
  if (!repository)
    reject("source", `${text}: write hf://org/name, hf://org/name@revision or hf://org/name@revision/file.gguf`);
  return { repository, revision: match?.[2] ?? "main", gguf: match?.[3] };
}

export async function openHfSource(text: string, options: SourceOptions): Promise<Source> {
  const { repository, revision, gguf } = parseHf(text);
  const endpoint = process.env.HF_ENDPOINT || ENDPOINT;
  if (!URL.canParse(endpoint)) reject("HF_ENDPOINT", "is not a URL");
  const base = checkUrl(new URL(endpoint), "HF_ENDPOINT");
  const token = options.hfToken ?? process.env.HF_TOKEN;
  const http = httpOptions(options, token ? { origin: base.origin, token } : undefined);
  const placeAt = (commit: string): Place => ({
    url: `hf://${repository}@${commit}${gguf ? `/${gguf}` : ""}`,
    name: gguf ? gguf.slice(0, -".gguf".length) : (repository.split("/")[1] ?? repository),
    gguf,
    urlOf: (name) => {
      const root = base.pathname.replace(/\/$/, "");
      return new URL(`${base.origin}${root}/${repository}/resolve/${commit}/${encodeURIComponent(name)}`);
    },
    http,
  });
  const blobs = blobsOf(options);
  const asked = placeAt(revision);
  const branch = `${endpoint} ${asked.url}`;
  if (isOffline(options)) {
    const known = await blobs.recall(branch);
    return remoteSource(known ? placeAt(known.key) : reject("source", notCached(asked)), options);
  }
  const entry = gguf ?? "config.json";
  const file = await probe(entry, asked.urlOf(entry), http);
  const commit = file?.commit ?? revision;
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/.test(commit)) reject("source", "the server names an unusable commit");
  await blobs.remember(branch, { key: commit, name: repository, size: 0, etag: "" });
  if (!file) return remoteSource(asked, options);
  const place = placeAt(commit);
  return remoteSource(place, options, [{ ...file, url: place.urlOf(entry) }]);
}
