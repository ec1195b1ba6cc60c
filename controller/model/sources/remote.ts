// A place behind HTTP, shared by hf:// and https://: headers by ranges, small files and weights through the cache, and only
// the cache when offline.
import { type ByteSource, fileSource, memorySource } from "../byte-source.ts";
import { cacheRoot } from "../cache.ts";
import { reject } from "../reject.ts";
import { Blobs, CACHE_BYTES_DEFAULT } from "./blobs.ts";
import { download } from "./download.ts";
import { type HttpOptions, withoutQuery } from "./http.ts";
import { probe, type RemoteFile, rangeSource } from "./remote-file.ts";
import type { Source, SourceOptions } from "./source.ts";

/** What a scheme decides. */
export type Place = {
  url: string;
  name: string;
  gguf: string | undefined;
  /** Where a file lies. */
  urlOf(name: string): URL;
  http: HttpOptions;
};

/** Configuration, index, tokenizer and template files: kept whole, so that a later run can be offline. */
const SMALL = /\.(json|jinja)$/;

export function blobsOf(options: SourceOptions): Blobs {
  const asked = options.cacheBytesMax ?? Number(process.env.MUSTER_CACHE_BYTES_MAX ?? Number.NaN);
  const isUsable = Number.isSafeInteger(asked) && asked > 0;
  return new Blobs(cacheRoot(options.cacheDir), { bytesMax: isUsable ? asked : CACHE_BYTES_DEFAULT });
}

export function isOffline(options: SourceOptions): boolean {
  return options.offline ?? /^(1|true|yes|on)$/i.test(process.env.HF_HUB_OFFLINE ?? "");
}

export function httpOptions(options: SourceOptions, credentials?: HttpOptions["credentials"]): HttpOptions {
  return { ...(credentials ? { credentials } : {}), ...(options.signal ? { signal: options.signal } : {}) };
}

/** `known` are files that were looked up on the way to the place. */
export function remoteSource(place: Place, options: SourceOptions, known: readonly RemoteFile[] = []): Source {
  const blobs = blobsOf(options);
  const offline = isOffline(options);
  const probes = new Map(known.map((file) => [file.name, Promise.resolve<RemoteFile | undefined>(file)]));
  const address = (name: string) => withoutQuery(place.urlOf(name));
  const probed = (name: string) => {
    const found = probes.get(name) ?? probe(name, place.urlOf(name), place.http);
    probes.set(name, found);
    return found;
  };
  const cached = async (name: string): Promise<{ path: string; etag: string } | undefined> => {
    const reference = await blobs.recall(address(name));
    const path = reference && (await blobs.find(reference.key, reference.size));
    return reference && path ? { path, etag: reference.etag } : undefined;
  };
  const openCached = async (name: string): Promise<ByteSource | undefined> => {
    const found = await cached(name);
    const source = found && (await fileSource(found.path, name));
    return source && { ...source, etag: found.etag };
  };
  const openSmall = async (file: RemoteFile): Promise<ByteSource> => {
    await fetchAll([file], { blobs, place, options, address });
    return (await openCached(file.name)) ?? memorySource(file.name, file.prefix);
  };
  return {
    url: place.url,
    name: place.name,
    gguf: place.gguf,
    remote: true,
    listGguf: async () => [],
    open: async (name) => {
      if (offline) return openCached(name);
      const file = await probed(name);
      return file && (SMALL.test(name) ? openSmall(file) : rangeSource(file, place.http));
    },
    fetch: async (names) => {
      if (offline) {
        const found = await Promise.all(names.map(cached));
        return found.map((entry, i) => entry?.path ?? reject(names[i] ?? "", notCached(place)));
      }
      const files = await Promise.all(
        names.map(async (name) => (await probed(name)) ?? reject(name, "does not exist")),
      );
      return fetchAll(files, { blobs, place, options, address });
    },
  };
}

export const notCached = (place: { url: string }): string =>
  `${place.url} is not in the cache and offline mode is on (HF_HUB_OFFLINE); run it once online`;

type Context = { blobs: Blobs; place: Place; options: SourceOptions; address: (name: string) => string };

async function fetchAll(files: readonly RemoteFile[], context: Context): Promise<string[]> {
  const { blobs, place, options, address } = context;
  await blobs.makeRoom(files.map((file) => ({ key: Blobs.keyOf(file), size: file.size })));
  const total = files.reduce((sum, { size }) => sum + size, 0);
  const paths: string[] = [];
  let before = 0;
  for (const file of files) {
    const report = (bytes: number) => options.onProgress?.({ file: file.name, bytes: before + bytes, total });
    paths.push(await download(file, blobs, { ...place.http, onBytes: report }));
    const { name, size, etag } = file;
    await blobs.remember(address(name), { key: Blobs.keyOf(file), name, size, etag });
    report(size);
    before += size;
  }
  return paths;
}
