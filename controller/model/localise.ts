// A plan's model where a worker can read it: the source of the plan is opened anew on this machine, proved to be the one that
// was planned for, and its files are brought here. Owns what counts as the same model; transfers are sources/download.ts.
//
//   L1  no file is brought before headers, lengths and etags are known to be the plan's; what differs is named by its file.
//   L2  tensors, offsets and shard rules stay the plan's: only paths are written.
//   L3  all files of the model are brought, whole: experts may move to ranks of this worker while it serves.
import { FaultError, invalid } from "../../proto/fault.ts";
import { type ModelSpec, type ShardPlan, TensorSpec } from "../../proto/gen/muster/v1/plan.ts";
import { readModel } from "./model.ts";
import { openSource } from "./sources/open.ts";
import type { SourceOptions } from "./sources/source.ts";

export type LocaliseOptions = Pick<SourceOptions, "cacheDir" | "cacheBytesMax" | "offline" | "signal"> & {
  /** Bytes of all files together, as they come. */
  onProgress?: (bytes: number, total: number) => void;
};

/**
 * The plan with local paths. Throws FaultError: INVALID with the file that is not the plan's; TRANSIENT where the source cannot
 * be reached or the signal aborts. What has been brought by then stays, and is continued by the next call.
 */
export async function localise(plan: ShardPlan, options: LocaliseOptions = {}): Promise<ShardPlan> {
  const { model } = plan;
  if (model === undefined) throw new FaultError(invalid("plan.model", "is missing"));
  const { onProgress, ...rest } = options;
  let isPulling = false;
  const place = await openSource(model.source, {
    ...rest,
    onProgress: ({ bytes, total }) => {
      if (isPulling) onProgress?.(bytes, total);
    },
  });
  const found = await readModel(model.source, { ...rest, place, headersOnly: true, tokenizer: true });
  checkSame(model, found);
  isPulling = true;
  const names = model.files.map(({ name }) => name);
  const paths = await place.fetch(names);
  const files = model.files.map((file, index) => ({ ...file, path: paths[index] ?? "" }));
  const tokenizer = await localTokenizer(found, { ...rest, place });
  return { ...plan, model: { ...model, files, tokenizer } };
}

/** A GGUF file's tokenizer is made from its header and kept in the cache; that of a directory came with reading. */
async function localTokenizer(
  found: ModelSpec,
  options: Parameters<typeof readModel>[1],
): Promise<ModelSpec["tokenizer"]> {
  if (found.tokenizer === undefined || found.tokenizer.jsonPath !== "") return found.tokenizer;
  return (await readModel(found.source, { ...options, headersOnly: false })).tokenizer;
}

/** L1. Throws INVALID. */
function checkSame(planned: ModelSpec, found: ModelSpec): void {
  const refuse = (file: string, detail: string): never => {
    const advice = "put the planned weights back, or let a new revision be planned";
    throw new FaultError(invalid(file, `${planned.source}: ${detail}; ${advice}`, "model_changed"));
  };
  const lengths = new Map(found.files.map(({ name, bytes }) => [name, bytes]));
  for (const { name, bytes } of planned.files) {
    const length = lengths.get(name);
    if (length === undefined) refuse(name, "the plan names this file, it is not there");
    if (length !== bytes) refuse(name, `has ${length} bytes, the plan was made for ${bytes}`);
  }
  for (const { name } of found.files)
    if (!planned.files.some((file) => file.name === name)) refuse(name, "is there, the plan was made without it");
  if (planned.digest === found.digest) return;
  const odd = planned.tensors.findIndex((tensor, index) => !isSame(tensor, found.tensors[index]));
  const [only] = planned.files.length === 1 ? planned.files : [];
  const file = planned.files[planned.tensors[odd]?.file ?? -1] ?? only;
  const digests = `the plan was made for headers ${planned.digest.slice(0, 12)}, here are ${found.digest.slice(0, 12)}`;
  if (odd >= 0) refuse(file?.name ?? "plan.model.digest", `${digests}; they differ at ${planned.tensors[odd]?.name}`);
  refuse(
    file?.name ?? "plan.model.digest",
    `${digests}: a header, the configuration or what the server calls the content`,
  );
}

function isSame(one: TensorSpec, other: TensorSpec | undefined): boolean {
  if (other === undefined) return false;
  return Buffer.from(TensorSpec.encode(one).finish()).equals(TensorSpec.encode(other).finish());
}
