// Rules that hold for a value: written once, checked twice. The API server gets the CEL text, zod gets the predicate, and
// both say the same message, which names what to write instead. test/controller/api holds the two against each other.
import type { z } from "zod";

export type Rule<T> = {
  /** CEL over `self`. */
  cel: string;
  /** For the person who wrote the value: what is wrong and what to write instead. */
  message: string;
  holds: (value: T) => boolean;
  /** Field below the value that the message is about. */
  at?: string;
};

/** A rule over an edit: the API server has both sides, zod has not, so `holds` is asked by refusedEdits alone. */
export type EditRule<T> = {
  /** CEL over `self` and `oldSelf`. */
  cel: string;
  message: string;
  holds: (value: T, before: T) => boolean;
  at?: string;
};

/** One entry of `x-kubernetes-validations`. */
export type Validation = { rule: string; message: string; fieldPath?: string };

export const VALIDATIONS = "x-kubernetes-validations";

/** The schema with rules: refused by zod, and written into the CRD. Defaults have been filled in when a rule is asked. */
export function withRules<S extends z.ZodType>(
  schema: S,
  rules: readonly Rule<z.output<S>>[],
  edits: readonly EditRule<z.output<S>>[] = [],
): S {
  const refined = rules.reduce(
    (all, { holds, message, at }) =>
      all.refine(holds, { message, path: at === undefined ? [] : at.split("."), params: { isRule: true } }),
    schema,
  );
  const known = schema.meta()?.[VALIDATIONS];
  const all = [...(Array.isArray(known) ? known : []), ...[...rules, ...edits].map(validationOf)];
  return all.length === 0 ? refined : refined.meta({ [VALIDATIONS]: all });
}

function validationOf({ cel, message, at }: { cel: string; message: string; at?: string }): Validation {
  return at === undefined ? { rule: cel, message } : { rule: cel, message, fieldPath: `.${at}` };
}

/** Why an edit is refused, one message for each rule that it breaks. */
export function refusedEdits<T>(edits: readonly EditRule<T>[], value: T, before: T): { at: string; message: string }[] {
  return edits
    .filter(({ holds }) => !holds(value, before))
    .map(({ at, message }) => ({ at: at === undefined ? "spec" : `spec.${at}`, message }));
}
