// One case of the validation matrix, and the ways to write one.
import { minimalDeployment } from "./objects.ts";

export type MatrixCase = {
  name: string;
  object: unknown;
  /** The stored object that `object` replaces. */
  before?: unknown;
  /** Where present the object is written to this subresource of `before`. */
  subresource?: "status";
  accepted: boolean;
  /** Of what is said: the field, or a part of a rule's message. */
  messagePart?: string;
};

export type Spec = Record<string, unknown>;

export const edit = (name: string, before: unknown, object: unknown, messagePart?: string): MatrixCase =>
  messagePart === undefined
    ? { name, before, object, accepted: true }
    : { name, before, object, accepted: false, messagePart };
export const accept = (name: string, object: unknown): MatrixCase => ({ name, object, accepted: true });
export const refuse = (name: string, object: unknown, messagePart: string): MatrixCase => ({
  name,
  object,
  accepted: false,
  messagePart,
});
export const takes = (name: string, spec: Spec) => accept(name, minimalDeployment(spec));
export const refuses = (name: string, spec: Spec, messagePart: string) =>
  refuse(name, minimalDeployment(spec), messagePart);
