// A file behind HTTP: what it is (size, etag) from one request, and random access to its bytes by ranges.
import { FaultError, transient } from "../../../proto/fault.ts";
import { type ByteSource, checkRange } from "../byte-source.ts";
import { reject } from "../reject.ts";
import { type Answer, backOff, get, type HttpOptions, Interrupted, TRIES_MAX, withoutQuery } from "./http.ts";

export type RemoteFile = {
  name: string;
  url: URL;
  size: number;
  /** Identifies the content: the sha256 that Hugging Face links, else the etag; empty where the server gives none. */
  etag: string;
  /** A strong etag of the server that has the bytes, for If-Range; empty where there is none. */
  validator: string;
  hasRanges: boolean;
  /** The first bytes, read with the first request. */
  prefix: Buffer;
  /** Commit that a branch stood for, where the server names it. */
  commit: string | undefined;
};

/** Headers of most files fit. */
const PREFIX_BYTES = 256 * 1024;
/** Without ranges a header is read from the start of the file; further in than this nothing is looked for. */
const SKIP_BYTES_MAX = 256 * 1024 * 1024;
/** What a server may name as a size: more than any checkpoint file has. */
const SIZE_MAX = 2 ** 50;

const strong = (etag: string | null): string => (etag && !etag.startsWith("W/") ? etag : "");
const unquoted = (etag: string): string => etag.replace(/^W\//, "").replace(/^"|"$/g, "");

/** The content's identity as an answer tells it. */
export function identityOf(answer: Answer): string {
  const linked = answer.hops.map((hop) => hop.get("x-linked-etag")).find((etag) => etag !== null);
  return unquoted(linked ?? answer.headers.get("x-linked-etag") ?? answer.headers.get("etag") ?? "");
}

/** Undefined for 404. Throws INVALID for what the server refuses, naming HF_TOKEN where that may help. */
export async function probe(name: string, url: URL, options: HttpOptions): Promise<RemoteFile | undefined> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await probeOnce(name, url, options);
    } catch (fault) {
      if (!(fault instanceof Interrupted)) throw fault;
      if (attempt >= TRIES_MAX) throw broken(name, url, fault);
      await backOff(attempt, null, options.signal);
    }
  }
}

async function probeOnce(name: string, url: URL, options: HttpOptions): Promise<RemoteFile | undefined> {
  const answer = await get(url, { range: `bytes=0-${PREFIX_BYTES - 1}` }, options);
  const all = [...answer.hops, answer.headers];
  const commit = all.map((headers) => headers.get("x-repo-commit")).find((found) => found !== null) ?? undefined;
  const file = {
    ...{ name, url, etag: identityOf(answer), validator: strong(answer.headers.get("etag")) },
    ...{ commit, hasRanges: answer.status === 206 },
  };
  if (answer.status === 416) {
    await answer.discard();
    return { ...file, size: 0, prefix: Buffer.alloc(0) };
  }
  if (answer.status !== 200 && answer.status !== 206) {
    await answer.discard();
    return refuse(name, answer, options);
  }
  const size =
    answer.status === 206 ? rangeOf(answer, name).size : Number(answer.headers.get("content-length") ?? Number.NaN);
  if (!Number.isSafeInteger(size) || size < 0 || size > SIZE_MAX)
    reject(name, `${withoutQuery(url)} does not say how long the file is`);
  return { ...file, size, prefix: await take(answer, 0, Math.min(size, PREFIX_BYTES)) };
}

const broken = (name: string, url: URL, cause: unknown): FaultError =>
  new FaultError(transient("source_unreachable", `${withoutQuery(url)} broke off ${TRIES_MAX} times`, name), { cause });

/** undefined for "there is no such file"; faults for the rest. */
export function refuse(name: string, answer: Answer, options: HttpOptions): undefined {
  const code = answer.headers.get("x-error-code") ?? "";
  const { status } = answer;
  if (code === "RepoNotFound" || code === "RevisionNotFound")
    reject(
      "source",
      `${code === "RepoNotFound" ? "repository" : "revision"} not found, or private: set HF_TOKEN if it is yours`,
    );
  if (status === 404 || status === 410) return undefined;
  if (status === 401 || status === 403) {
    const sent = options.credentials
      ? "the HF_TOKEN that was sent does not allow it"
      : "set HF_TOKEN for gated and private models";
    reject(
      name,
      `the server refuses access (HTTP ${status}): ${sent}; a gated model's terms must be accepted on its page`,
    );
  }
  return reject(name, `the server answers HTTP ${status}`);
}

/** What Content-Range says, checked. */
export function rangeOf(answer: Answer, name: string): { begin: number; end: number; size: number } {
  const match = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(answer.headers.get("content-range") ?? "");
  const [begin, end, size] = [Number(match?.[1]), Number(match?.[2]) + 1, Number(match?.[3])];
  if (!match || !(begin < end && end <= size && size <= SIZE_MAX))
    reject(name, `the server's Content-Range makes no sense: ${answer.headers.get("content-range")}`);
  return { begin, end, size };
}

/** `length` bytes after the first `skip` of the body; the rest is not read. */
async function take(answer: Answer, skip: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  let position = -skip;
  for await (const piece of answer.body()) {
    const from = Math.max(0, -position);
    const wanted = piece.subarray(from, Math.max(from, length - position));
    if (wanted.length > 0) buffer.set(wanted, position + from);
    position += piece.length;
    if (position >= length) return buffer;
  }
  if (position < length) throw new Interrupted("the body ended early");
  return buffer;
}

/** Random access by ranges. The caller closes nothing: there is no connection to keep. */
export function rangeSource(file: RemoteFile, options: HttpOptions): ByteSource {
  return {
    name: file.name,
    size: file.size,
    etag: file.etag,
    read: async (offset, length) => {
      checkRange(file, offset, length);
      if (offset + length <= file.prefix.length) return Buffer.from(file.prefix.subarray(offset, offset + length));
      for (let attempt = 1; ; attempt++) {
        try {
          return await readRange(file, { offset, length }, options);
        } catch (fault) {
          if (!(fault instanceof Interrupted)) throw fault;
          if (attempt >= TRIES_MAX) throw broken(file.name, file.url, fault);
          await backOff(attempt, null, options.signal);
        }
      }
    },
    close: async () => {},
  };
}

async function readRange(
  file: RemoteFile,
  { offset, length }: { offset: number; length: number },
  options: HttpOptions,
): Promise<Buffer> {
  if (length === 0) return Buffer.alloc(0);
  const answer = await get(
    file.url,
    file.hasRanges ? { range: `bytes=${offset}-${offset + length - 1}` } : {},
    options,
  );
  if (answer.status !== 200 && answer.status !== 206) {
    await answer.discard();
    refuse(file.name, answer, options);
    reject(file.name, "is not there any more");
  }
  if (identityOf(answer) !== file.etag) {
    await answer.discard();
    throw changed(file, identityOf(answer));
  }
  if (answer.status === 200) {
    if (offset + length <= SKIP_BYTES_MAX) return take(answer, offset, length);
    await answer.discard();
    const detail = "the server gives no ranges and this part lies too far in; use a server with range support";
    reject(file.name, detail, offset);
  }
  const range = rangeOf(answer, file.name);
  if (range.begin !== offset || range.end !== offset + length || range.size !== file.size)
    reject(
      file.name,
      `asked for bytes ${offset}..${offset + length}, got ${range.begin}..${range.end} of ${range.size}`,
    );
  return take(answer, 0, length);
}

export const changed = (file: RemoteFile, etag: string): FaultError =>
  new FaultError(
    transient(
      "source_changed",
      `changed at the source while it was read: etag ${file.etag} became ${etag}; start again`,
      file.name,
    ),
  );
