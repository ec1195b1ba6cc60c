// A source whose bytes were read by somebody else: who can reach it reads headers through a recorder, and who cannot reads the
// recording. Owns what is recorded and that nothing else can be read from it.
//
//   C1  a recorded source answers exactly what the place answered, and refuses every byte that was not read there.
//   C2  what is read twice is recorded once; a recording has at most RECORDED_BYTES_MAX bytes.
import type { ByteSource } from "../byte-source.ts";
import { reject } from "../reject.ts";
import type { Source } from "./source.ts";

/** Bytes of one file that were read, in the order in which they lie. */
export type RecordedFile = { name: string; size: number; etag: string; parts: { offset: number; data: Uint8Array }[] };

/** Plain data: it crosses threads and processes. */
export type Recording = {
  /** As the place names itself. */
  url: string;
  name: string;
  gguf: string | undefined;
  /** GGUF files that lie there. */
  ggufs: string[];
  files: RecordedFile[];
};

/** Headers, index, tokenizer and configuration of the largest published models have less than half of it. */
export const RECORDED_BYTES_MAX = 128 * 1024 * 1024;

/** `place` reads through; `recording` is what has been read so far. */
export function recorder(place: Source): { place: Source; recording: Recording } {
  const recording: Recording = { url: place.url, name: place.name, gguf: place.gguf, ggufs: [], files: [] };
  let bytes = 0;
  const keep = (file: RecordedFile, offset: number, data: Buffer): void => {
    if (covering(file, offset, data.length) !== undefined) return;
    bytes += data.length;
    if (bytes > RECORDED_BYTES_MAX)
      reject(file.name, `reading the headers took more than ${RECORDED_BYTES_MAX} bytes`, offset);
    file.parts.push({ offset, data });
  };
  const record = (source: ByteSource): ByteSource => {
    let file = recording.files.find(({ name }) => name === source.name);
    if (file === undefined) {
      file = { name: source.name, size: source.size, etag: source.etag, parts: [] };
      recording.files.push(file);
    }
    const kept = file;
    return {
      ...source,
      read: async (offset, length) => {
        const data = await source.read(offset, length);
        keep(kept, offset, data);
        return data;
      },
      close: () => source.close(),
    };
  };
  const recorded: Source = {
    ...place,
    // Nobody computes with it here: files are looked at, not brought.
    remote: true,
    listGguf: async () => {
      recording.ggufs = await place.listGguf();
      return recording.ggufs;
    },
    open: async (name) => {
      const source = await place.open(name);
      return source && record(source);
    },
    fetch: async (names) => names.map(() => ""),
  };
  return { place: recorded, recording };
}

/** Paths of its files are empty. */
export function recordedSource({ url, name, gguf, ggufs, files }: Recording): Source {
  return {
    url,
    name,
    gguf,
    remote: true,
    listGguf: async () => [...ggufs],
    open: async (wanted) => {
      const file = files.find((each) => each.name === wanted);
      return file && replayed(file);
    },
    fetch: async (names) => names.map(() => ""),
  };
}

function replayed(file: RecordedFile): ByteSource {
  const { name, size, etag } = file;
  return {
    name,
    size,
    etag,
    read: async (offset, length) => {
      const part = covering(file, offset, length);
      if (part === undefined) return reject(name, `${length} bytes of it were not looked at where it lies`, offset);
      const begin = offset - part.offset;
      return Buffer.from(part.data.subarray(begin, begin + length));
    },
    close: async () => {},
  };
}

function covering({ parts }: RecordedFile, offset: number, length: number) {
  return parts.find(({ offset: begin, data }) => begin <= offset && offset + length <= begin + data.length);
}
