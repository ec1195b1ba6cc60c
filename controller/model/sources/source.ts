// A model's source as the rest sees it: a place with named files. The schemes are one file each beside this one.
import type { ByteSource } from "../byte-source.ts";
import { reject } from "../reject.ts";

/** Bytes so far and in all, over every file of the model. */
export type Progress = { file: string; bytes: number; total: number };

export type SourceOptions = {
  cacheDir?: string;
  /** Bytes that downloaded files may take together; the oldest unused ones go first. */
  cacheBytesMax?: number;
  hfToken?: string;
  /** Bearer token of an https:// source; default: MUSTER_SOURCE_TOKEN. Sent to the source's own origin only. */
  sourceToken?: string;
  /** Only what is local or cached. */
  offline?: boolean;
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
};

export type Source = {
  /** Canonical URL; a branch is replaced by the commit it stood for. */
  readonly url: string;
  /** For people. */
  readonly name: string;
  /** The GGUF file that the URL names, relative to the place. */
  readonly gguf: string | undefined;
  /** Whether the bytes have to be downloaded before a rank can read them. */
  readonly remote: boolean;
  /** GGUF files that lie there; empty where a place cannot be listed. */
  listGguf(): Promise<string[]>;
  /** Undefined where there is no such file. The caller closes it. */
  open(name: string): Promise<ByteSource | undefined>;
  /** Makes files local and answers their paths, in order. */
  fetch(names: readonly string[]): Promise<string[]>;
};

/** A URL's path as text. Throws INVALID for a "%" that begins no escape. */
export function decoded(path: string): string {
  try {
    return decodeURIComponent(path);
  } catch {
    return reject("source", `${path} holds a "%" that begins no escape; write it as %25`);
  }
}
