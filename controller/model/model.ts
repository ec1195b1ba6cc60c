// The entry: source -> headers -> ModelSpec. Owns the order of reading and what is put together; sources, containers and
// families are files of their own. Nothing here reads weights, except the few numbers of rope_freqs.
import { createHash } from "node:crypto";
import { FaultError, transient } from "../../proto/fault.ts";
import type { FileSpec, ModelSpec, TokenizerSpec } from "../../proto/gen/muster/v1/plan.ts";
import { StoredType } from "../../proto/gen/muster/v1/plan.ts";
import { type ByteSource, readWhole } from "./byte-source.ts";
import { cacheRoot, keep } from "./cache.ts";
import { type Found, openCheckpoint, openGguf } from "./checkpoint.ts";
import { familyOfConfig, familyOfGguf } from "./families.ts";
import type { Described } from "./family.ts";
import { convertGgufTokenizer } from "./gguf-tokenizer.ts";
import { parseJsonObject } from "./json.ts";
import { Keys } from "./keys.ts";
import { reject } from "./reject.ts";
import { openSource } from "./sources/open.ts";
import type { Source, SourceOptions } from "./sources/source.ts";
import { readHfTokenizer, vocabHash } from "./tokenizer.ts";

export type { Progress } from "./sources/source.ts";

export type ReadModelOptions = SourceOptions & {
  /** Read headers only: what a plan needs. Nothing large is downloaded; `files[].path` of a remote source stays empty. */
  headersOnly?: boolean;
  /** With headersOnly: read the tokenizer of a remote source as well, tens of megabytes at most; its path may stay empty. */
  tokenizer?: boolean;
  /** Where the source has been opened already: it is read from there. */
  place?: Source;
};

const CONFIG_BYTES_MAX = 4 * 1024 * 1024;
const CONFIG = "config.json";

/** What the readers of both containers answer. */
type Read = {
  family: string;
  described: Described;
  files: ByteSource[];
  tokenizer: TokenizerSpec | undefined;
  stopIds: number[];
  bosId: number;
  format: string;
  planOnly: string;
  projected: boolean;
  /** In the order in which they go into the digest. */
  headers: Uint8Array[];
};

/**
 * Reads a model's headers and makes its files local. `source` is builtin://name, file:///path, hf://org/name@rev[/x.gguf] or
 * https://host/path. Throws FaultError: INVALID with file, key and offset; TRANSIENT where the network failed.
 */
export async function readModel(source: string, options: ReadModelOptions = {}): Promise<ModelSpec> {
  const place = options.place ?? (await openSource(source, options));
  const opened: ByteSource[] = [];
  try {
    const read = place.gguf
      ? await readGgufModel(place, place.gguf, opened, options)
      : await readDirectory(place, opened, options);
    return await finish(place, read, options);
  } catch (cause) {
    throw systemFault(cause);
  } finally {
    for (const file of opened) await file.close();
  }
}

/** What the operating system refused (no space, no permission) is no defect of the model; anything else is a bug and stays one. */
function systemFault(cause: unknown): unknown {
  if (!(cause instanceof Error) || !("syscall" in cause) || !("code" in cause)) return cause;
  return new FaultError(transient("system", `${cause.code} in ${cause.syscall}: ${cause.message}`, "source"), {
    cause,
  });
}

async function readDirectory(place: Source, opened: ByteSource[], options: ReadModelOptions): Promise<Read> {
  const file = await place.open(CONFIG);
  if (file) opened.push(file);
  const found = await openCheckpoint(place);
  if (found) opened.push(...found.checkpoint.files);
  if (!found) {
    const ggufs = await place.listGguf();
    const [only] = ggufs;
    if (only && ggufs.length === 1) return readGgufModel(place, only, opened, options);
    if (ggufs.length > 1) reject("source", `${place.url} has several GGUF files; name one of ${ggufs.join(", ")}`);
  }
  if (!file) reject(CONFIG, `${place.url} has no config.json; for a GGUF model name the .gguf file`);
  return readHfModel({ place, file, found, options });
}

async function readHfModel(parts: {
  place: Source;
  file: ByteSource;
  found: Found | undefined;
  options: ReadModelOptions;
}): Promise<Read> {
  const { place, file, found, options } = parts;
  const bytes = await readWhole(file, CONFIG_BYTES_MAX);
  const config = new Keys(CONFIG, parseJsonObject(bytes, CONFIG).entries);
  const family = familyOfConfig(config);
  const described = family.describe({ kind: "hf", config, checkpoint: found?.checkpoint });
  const generation = await readGeneration(place);
  const text = config.child("text_config") ?? config;
  const ids = [...config.ids("eos_token_id"), ...text.ids("eos_token_id"), ...(generation?.ids("eos_token_id") ?? [])];
  const isLeftOut = place.remote && options.headersOnly && !options.tokenizer;
  const tokenizer = isLeftOut ? undefined : await readHfTokenizer(place);
  const [bosId = 0] = [...text.ids("bos_token_id"), ...config.ids("bos_token_id")];
  const formatName = found ? "safetensors" : "config only,";
  return {
    family: family.name,
    described,
    files: found?.checkpoint.files ?? [],
    tokenizer,
    stopIds: [...new Set(ids)],
    bosId,
    format: `${formatName} ${mostlyStoredAs(described)}`,
    planOnly:
      described.planOnly || (found ? fp8Reason(described) : `${place.name} has no weights beside its config.json`),
    projected: config.flag("muster_projected", false),
    headers: [bytes, ...(found?.headers ?? [])],
  };
}

async function readGeneration(place: Source): Promise<Keys | undefined> {
  const name = "generation_config.json";
  const file = await place.open(name);
  if (!file) return undefined;
  try {
    return new Keys(name, parseJsonObject(await readWhole(file, CONFIG_BYTES_MAX), name).entries);
  } finally {
    await file.close();
  }
}

async function readGgufModel(
  place: Source,
  name: string,
  opened: ByteSource[],
  options: ReadModelOptions,
): Promise<Read> {
  const gguf = await openGguf(place, name);
  opened.push(...gguf.checkpoint.files);
  const keys = new Keys(name, gguf.keys);
  const family = familyOfGguf(keys);
  const architecture = keys.text("general.architecture");
  const described = family.describe({
    kind: "gguf",
    keys: keys.prefixed(`${architecture}.`),
    checkpoint: gguf.checkpoint,
    ropeFactors: gguf.ropeFactors,
  });
  const converted = convertGgufTokenizer(keys);
  const tokenizer = converted && {
    // A controller that only plans may have nowhere to write.
    jsonPath: options.headersOnly ? "" : await keep(cacheRoot(options.cacheDir), "tokenizers", converted.json),
    chatTemplate: converted.chatTemplate,
    bosToken: converted.bosToken,
    eosToken: converted.eosToken,
    addBos: converted.addBos,
    vocabHash: vocabHash(converted.texts),
  };
  return {
    family: family.name,
    described,
    files: gguf.checkpoint.files,
    tokenizer,
    stopIds: converted?.stopIds ?? [],
    bosId: converted?.bosId ?? 0,
    format: `GGUF ${ggufFormat(keys, described)}`,
    planOnly: described.planOnly || fp8Reason(described),
    projected: false,
    headers: gguf.headers,
  };
}

async function finish(place: Source, read: Read, options: ReadModelOptions): Promise<ModelSpec> {
  const { described, files } = read;
  const { total, active } = described.table.parameters(described.topK);
  const names = files.map((file) => file.name);
  const paths = place.remote && options.headersOnly ? names.map(() => "") : await place.fetch(names);
  const fileSpecs = files.map(
    (file, i): FileSpec => ({ path: paths[i] ?? "", bytes: BigInt(file.size), name: file.name }),
  );
  if (fileSpecs.length === 0 && described.table.planes.length > 0)
    fileSpecs.push({ path: "", bytes: BigInt(described.table.syntheticBytes), name: "(no weights)" });
  return {
    name: place.name,
    family: read.family,
    source: place.url,
    digest: digestOf(read),
    vocabSize: described.vocabSize,
    hiddenSize: described.hiddenSize,
    contextTokens: described.contextTokens,
    normEps: described.normEps,
    tiedHead: described.tiedHead,
    blocks: described.blocks,
    kvGroups: described.kvGroups,
    tensors: described.table.planes,
    files: fileSpecs,
    tokenizer: read.tokenizer,
    stopIds: read.stopIds.filter((id) => id < described.vocabSize),
    bosId: read.bosId,
    planOnly: read.planOnly,
    projected: read.projected,
    format: read.format,
    parameters: BigInt(total),
    parametersActive: BigInt(Math.round(active)),
  };
}

/** Over headers, sizes and etags: the same weights have the same digest without being read. */
function digestOf(read: Read): string {
  const hash = createHash("sha256");
  for (const header of read.headers) hash.update(`${header.length}\n`).update(header);
  for (const file of read.files) hash.update(`${file.name}\n${file.size}\n${file.etag}\n`);
  return hash.digest("hex");
}

function fp8Reason(described: Described): string {
  const isFp8 = described.table.planes.some((plane) => plane.type === StoredType.F8_E4M3);
  return isFp8 ? "weights stored as FP8 can be planned but are not served yet" : "";
}

const TYPE_NAMES = new Map<StoredType, string>(
  Object.entries(StoredType).map(([name, type]) => [type, name === "F8_E4M3" ? "FP8" : name]),
);

/** The stored type that takes the most bytes. */
function mostlyStoredAs(described: Described): string {
  const bytes = new Map<StoredType, bigint>();
  for (const plane of described.table.planes) bytes.set(plane.type, (bytes.get(plane.type) ?? 0n) + plane.bytes);
  const [most] = [...bytes].toSorted((a, b) => (b[1] > a[1] ? 1 : -1));
  return TYPE_NAMES.get(most?.[0] ?? StoredType.UNSPECIFIED) ?? "";
}

/** `general.file_type`, for people; where it is unknown, the type that takes the most bytes. */
const FILE_TYPES: ReadonlyMap<number, string> = new Map([
  [0, "F32"],
  [1, "F16"],
  [2, "Q4_0"],
  [3, "Q4_1"],
  [7, "Q8_0"],
  [14, "Q4_K_S"],
  [15, "Q4_K_M"],
  [16, "Q5_K_S"],
  [17, "Q5_K_M"],
  [18, "Q6_K"],
  [32, "BF16"],
]);

function ggufFormat(keys: Keys, described: Described): string {
  const id = keys.integer("general.file_type", { min: 0, max: 65_535 }, 65_535);
  return FILE_TYPES.get(id) ?? mostlyStoredAs(described);
}
