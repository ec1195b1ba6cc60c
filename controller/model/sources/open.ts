// From a source URL to a place with files, by scheme.
import { reject, unsupported } from "../reject.ts";
import { openBuiltinSource } from "./builtin.ts";
import { openFileSource } from "./file.ts";
import { openHfSource } from "./hf.ts";
import { openHttpSource } from "./https.ts";
import { openPvcSource } from "./pvc.ts";
import type { Source, SourceOptions } from "./source.ts";

const SCHEMES = "builtin://, file://, hf://, https:// and, in pods, pvc://";

export async function openSource(url: string, options: SourceOptions): Promise<Source> {
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//.exec(url)?.[1];
  switch (scheme) {
    case "builtin":
      return openBuiltinSource(url);
    case "file":
      return openFileSource(url);
    case "hf":
      return openHfSource(url, options);
    case "https":
    case "http":
      return openHttpSource(url, options);
    case "pvc":
      return openPvcSource(url);
    case undefined:
      return reject(
        "source",
        `"${url}" has no scheme; for a local path write file://${url.startsWith("/") ? "" : "./"}${url}`,
      );
    default:
      return unsupported("source", `${scheme}:// is not supported; ${SCHEMES} are`);
  }
}
