// Which DraftPool guesses for which model: equal vocabularies only, because a draft speaks in token ids. Pure.
import type { Notice } from "../../api/model-deployment.ts";
import type { PoolView } from "./world.ts";

export type Pairing = {
  speculation: { active: boolean; pool: string; detail: string };
  /** Whether groups that are made now may be told of the pool: not refused. */
  isAllowed: boolean;
  notices: readonly Notice[];
};

const FIELD = "spec.speculation.draftPool";

/** `vocabulary`: the model's; undefined: its headers do not tell. */
export function pairing(name: string, pool: PoolView | undefined, vocabulary: string | undefined): Pairing {
  const inactive = (detail: string): Pairing => ({
    speculation: { active: false, pool: name, detail },
    isAllowed: true,
    notices: [{ field: FIELD, kind: "Needed", message: detail }],
  });
  if (pool === undefined)
    return inactive(`there is no DraftPool ${name} in this namespace: make one, or remove the field`);
  if (vocabulary === undefined) {
    const detail = "the headers of the model do not tell its vocabulary: nothing is known to fit";
    return inactive(`${detail}; use a GGUF file, or a source that holds the tokenizer`);
  }
  const served =
    pool.vocabularies.length > 0 ? pool.vocabularies : pool.vocabulary === undefined ? [] : [pool.vocabulary];
  if (served.length === 0)
    return inactive(`the vocabulary of DraftPool ${name} is not known yet: it waits for its plan`);
  if (!served.includes(vocabulary) || (pool.vocabulary !== undefined && pool.vocabulary !== vocabulary)) {
    const theirs = pool.vocabulary ?? served.join(", ");
    const detail = `DraftPool ${name} has vocabulary ${theirs}, the model has ${vocabulary}: name a pool of the same one`;
    return {
      speculation: { active: false, pool: name, detail },
      isAllowed: false,
      notices: [{ field: FIELD, kind: "Refused", message: detail }],
    };
  }
  const speculation = { active: pool.ready > 0, pool: name, detail: `${pool.ready} drafts are ready` };
  return { speculation, isAllowed: true, notices: [] };
}
