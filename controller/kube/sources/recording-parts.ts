// A recording as it comes from an inspect pod, part by part. Owns order, bounds and completeness of the parts; what they mean is
// controller/model's.
import { FaultError, invalid, lost } from "../../../proto/fault.ts";
import type { InspectedPart } from "../../../proto/gen/muster/v1/report.ts";
import type { Fault } from "../../../proto/gen/muster/v1/worker.ts";
import { RECORDED_BYTES_MAX, type RecordedFile, type Recording } from "../../model/sources/recorded.ts";

/** Shards of a checkpoint and the small files beside them. */
const FILES_MAX = 1100;
const GGUFS_MAX = 10_000;

export type Told = { kind: "more" } | { kind: "whole"; recording: Recording } | { kind: "failed"; fault: Fault };

type Building = { offset: number; pieces: Uint8Array[]; bytes: number };

export class RecordingParts {
  readonly #files: { file: RecordedFile; parts: Building[] }[] = [];
  #source: Omit<Recording, "files"> | undefined;
  bytes = 0;

  /** Throws FaultError where the part cannot follow, or is too much. */
  take({ kind }: InspectedPart): Told {
    switch (kind?.$case) {
      case "source":
        return this.#begin(kind.value);
      case "file":
        return this.#file(kind.value);
      case "bytes":
        return this.#bytes(Number(kind.value.offset), kind.value.data);
      case "fault":
        return { kind: "failed", fault: kind.value };
      case "end":
        return this.#end(kind.value);
      default:
        throw new FaultError(invalid("kind", "a part says nothing that this controller knows"));
    }
  }

  #begin({ url, name, gguf, ggufs }: { url: string; name: string; gguf: string; ggufs: string[] }): Told {
    if (this.#source !== undefined) throw new FaultError(invalid("source", "it was there already"));
    if (ggufs.length > GGUFS_MAX) throw new FaultError(invalid("source.ggufs", `has more than ${GGUFS_MAX} names`));
    this.#source = { url, name, gguf: gguf === "" ? undefined : gguf, ggufs };
    return { kind: "more" };
  }

  #file({ name, bytes, etag }: { name: string; bytes: bigint; etag: string }): Told {
    if (this.#files.length >= FILES_MAX) throw new FaultError(invalid("file", `there are more than ${FILES_MAX}`));
    if (this.#files.some(({ file }) => file.name === name))
      throw new FaultError(invalid("file.name", `${name} is there twice`));
    const size = Number(bytes);
    if (!Number.isSafeInteger(size)) throw new FaultError(invalid("file.bytes", `${name} cannot have ${bytes} bytes`));
    this.#files.push({ file: { name, size, etag, parts: [] }, parts: [] });
    return { kind: "more" };
  }

  #bytes(offset: number, data: Uint8Array): Told {
    const current = this.#files.at(-1);
    if (current === undefined) throw new FaultError(invalid("bytes", "they belong to no file"));
    const { file, parts } = current;
    if (!Number.isSafeInteger(offset) || offset + data.length > file.size)
      throw new FaultError(invalid("bytes.offset", `${file.name} ends at ${file.size}`));
    this.bytes += data.length;
    if (this.bytes > RECORDED_BYTES_MAX)
      throw new FaultError(invalid("bytes", `more than ${RECORDED_BYTES_MAX} bytes of headers`, "too_large"));
    const last = parts.at(-1);
    if (last !== undefined && last.offset + last.bytes === offset) {
      last.pieces.push(data);
      last.bytes += data.length;
    } else parts.push({ offset, pieces: [data], bytes: data.length });
    return { kind: "more" };
  }

  #end({ files, bytes }: { files: number; bytes: bigint }): Told {
    if (this.#source === undefined) throw new FaultError(invalid("source", "the first part is missing"));
    if (files !== this.#files.length || Number(bytes) !== this.bytes)
      throw new FaultError(
        lost("parts_lost", `${this.#files.length} of ${files} files have come, ${this.bytes} of ${bytes} bytes`),
      );
    const whole = this.#files.map(({ file, parts }) => ({
      ...file,
      parts: parts.map(({ offset, pieces }) => ({ offset, data: Buffer.concat(pieces) })),
    }));
    return { kind: "whole", recording: { ...this.#source, files: whole } };
  }
}
