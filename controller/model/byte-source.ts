// Random access to the bytes of one file, wherever it lies. Readers of headers need nothing else.
import { type FileHandle, open } from "node:fs/promises";
import { FaultError, transient } from "../../proto/fault.ts";
import { reject } from "./reject.ts";

export type ByteSource = {
  /** Inside the model's source, for messages: "model-00001-of-00002.safetensors". */
  readonly name: string;
  readonly size: number;
  /** What the server says identifies the content; empty for local files. */
  readonly etag: string;
  /** Exactly `length` bytes; a fault where the range is not inside the file. */
  read(offset: number, length: number): Promise<Buffer>;
  close(): Promise<void>;
};

/** One read never asks for more: the longest header that is accepted, with room. */
export const READ_BYTES_MAX = 256 * 1024 * 1024;

export function checkRange(source: { name: string; size: number }, offset: number, length: number): void {
  if (length > READ_BYTES_MAX)
    reject(source.name, `a part of ${length} bytes is larger than ${READ_BYTES_MAX}`, offset);
  if (offset < 0 || offset + length > source.size)
    reject(source.name, `ends at byte ${source.size}, but ${length} bytes were expected`, offset);
}

export function memorySource(name: string, bytes: Uint8Array): ByteSource {
  return {
    name,
    size: bytes.length,
    etag: "",
    read: async (offset, length) => {
      checkRange({ name, size: bytes.length }, offset, length);
      return Buffer.from(bytes.subarray(offset, offset + length));
    },
    close: async () => {},
  };
}

/** Undefined where there is no such file. */
export async function fileSource(path: string, name: string): Promise<ByteSource | undefined> {
  let handle: FileHandle;
  try {
    handle = await open(path, "r");
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? cause.code : "";
    if (code === "ENOENT" || code === "ENOTDIR") return undefined;
    throw new FaultError(transient("unreadable", `${path} cannot be opened: ${code}`, name), { cause });
  }
  const stat = await handle.stat();
  if (!stat.isFile()) {
    await handle.close();
    return undefined;
  }
  const size = stat.size;
  return {
    name,
    size,
    etag: "",
    read: async (offset, length) => {
      checkRange({ name, size }, offset, length);
      const buffer = Buffer.alloc(length);
      for (let done = 0; done < length; ) {
        const { bytesRead } = await handle.read(buffer, done, length - done, offset + done);
        if (bytesRead === 0) reject(name, "the file became shorter while it was read", offset + done);
        done += bytesRead;
      }
      return buffer;
    },
    close: () => handle.close(),
  };
}

/** The whole of a small file. */
export async function readWhole(source: ByteSource, bytesMax: number): Promise<Buffer> {
  if (source.size > bytesMax) reject(source.name, `has ${source.size} bytes, more than the ${bytesMax} accepted`);
  return source.read(0, source.size);
}
