// Fields that several kinds share: names, quantities, lists with bounds. Every string, list and map has a bound, because
// the API server prices each CEL rule by them (R17).
import { z } from "zod";
import { type Rule, withRules } from "./rules.ts";

const NAME_MAX = 253;
const LABEL_VALUE_MAX = 63;
const LABEL_KEY_MAX = 317; // prefix of 253, a slash, a name of 63
const MAP_MAX = 32;

const DNS_NAME = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$";
const isDnsName = new RegExp(DNS_NAME);

/** Name of an object of the same namespace. */
export function objectName(what: string): z.ZodString {
  return withRules(z.string().min(1).max(NAME_MAX), [
    {
      cel: `self.matches('${DNS_NAME}')`,
      message: `write the name of ${what}: lower-case letters, digits, "-" and "."`,
      holds: (name) => isDnsName.test(name),
    },
  ]);
}

const LABEL_VALUE = "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$";
const LABEL_KEY = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
const isLabelValue = new RegExp(LABEL_VALUE);
const isLabelKey = new RegExp(LABEL_KEY);

type TextMap = Record<string, string>;

const keyRule: Rule<TextMap> = {
  cel: `self.all(key, key.size() <= ${LABEL_KEY_MAX} && key.matches('${LABEL_KEY}'))`,
  message: 'write keys such as team or example.com/team: letters, digits, "-", "_" and "."',
  holds: (map) => Object.keys(map).every((key) => key.length <= LABEL_KEY_MAX && isLabelKey.test(key)),
};

const valueRule: Rule<TextMap> = {
  cel: `self.all(key, self[key].matches('${LABEL_VALUE}'))`,
  message: `write label values of at most ${LABEL_VALUE_MAX} letters, digits, "-", "_" and "."`,
  holds: (map) => Object.values(map).every((value) => isLabelValue.test(value)),
};

function textMap(valueMax: number, rules: readonly Rule<TextMap>[]) {
  const map = z
    .record(z.string(), z.string().max(valueMax))
    .refine((entries) => Object.keys(entries).length <= MAP_MAX, { message: `write at most ${MAP_MAX} entries` })
    .meta({ maxProperties: MAP_MAX });
  return withRules(map, rules);
}

export const labelMap = (...rules: readonly Rule<TextMap>[]) =>
  textMap(LABEL_VALUE_MAX, [keyRule, valueRule, ...rules]);

const ANNOTATION_MAX = 4096;
export const annotationMap = (...rules: readonly Rule<TextMap>[]) => textMap(ANNOTATION_MAX, [keyRule, ...rules]);

/** As labels have them. */
export const labelValue = withRules(z.string().min(1).max(LABEL_VALUE_MAX), [
  {
    cel: `self.matches('${LABEL_VALUE}')`,
    message: `write at most ${LABEL_VALUE_MAX} letters, digits, "-", "_" and ".", as the label on the nodes`,
    holds: (value) => isLabelValue.test(value),
  },
]);

const QUANTITY = "^[0-9]+([.][0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$";
const isQuantity = new RegExp(QUANTITY);
const QUANTITY_MAX = 32;

/** A Kubernetes quantity, never negative: 500m, 4, 64Gi. */
export const quantity = withRules(z.union([z.int().min(0), z.string().max(QUANTITY_MAX)]), [
  {
    cel: `type(self) == int ? self >= 0 : self.matches('${QUANTITY}')`,
    message: "write a quantity such as 500m, 4 or 64Gi",
    holds: (value) => (typeof value === "number" ? value >= 0 : isQuantity.test(value)),
  },
]);

export const toleration = withRules(
  z.strictObject({
    key: z.string().max(LABEL_KEY_MAX).optional(),
    operator: z.enum(["Exists", "Equal"]).default("Equal"),
    value: z.string().max(LABEL_VALUE_MAX).optional(),
    effect: z.enum(["NoSchedule", "PreferNoSchedule", "NoExecute"]).optional(),
    tolerationSeconds: z.int().min(0).max(86_400).optional(),
  }),
  [
    {
      cel: "self.operator != 'Exists' || !has(self.value)",
      message: "a toleration with operator Exists has no value: remove value, or write operator: Equal",
      holds: ({ operator, value }) => operator !== "Exists" || value === undefined,
      at: "value",
    },
    {
      cel: "has(self.key) || self.operator == 'Exists'",
      message: "a toleration without key tolerates every taint: write operator: Exists, or give the key",
      holds: ({ key, operator }) => key !== undefined || operator === "Exists",
      at: "key",
    },
  ],
);

/** A list without order whose entries differ in `key`; as the API server merges it. */
export function listBy<S extends z.ZodType>(entry: S, key: keyof z.output<S> & string, max: number) {
  return uniqueList(entry, max, (value) => String(value[key])).meta({
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": [key],
  });
}

/** A list without order and without repeats. */
export function listOf<S extends z.ZodType<string>>(entry: S, max: number) {
  return uniqueList(entry, max, String).meta({ "x-kubernetes-list-type": "set" });
}

function uniqueList<S extends z.ZodType>(entry: S, max: number, keyOf: (value: z.output<S>) => string) {
  return z
    .array(entry)
    .max(max)
    .superRefine((list, context) => {
      const keys = list.map(keyOf);
      const again = keys.findIndex((name, index) => keys.indexOf(name) !== index);
      if (again < 0) return;
      context.addIssue({ code: "custom", path: [again], message: `"${keys[again]}" is there twice: remove one` });
    });
}

const TOLERATIONS_MAX = 16;
export const tolerations = z.array(toleration).max(TOLERATIONS_MAX).meta({ "x-kubernetes-list-type": "atomic" });

/** RFC 3339 in UTC, as the API server writes it. */
export const timestamp = z.iso.datetime();

/** A count of bytes or tokens in a status; exact in JSON up to 2^53. */
export const count = z.int().min(0);

const DURATION = "^([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?$";
const DURATION_MAX_SECONDS = 86_400;

/** `90s`, `5m`, `1h30m` in seconds; undefined for anything else. */
export function durationSeconds(text: string): number | undefined {
  const match = new RegExp(DURATION).exec(text);
  if (match === null || text === "") return undefined;
  const [hours, minutes, seconds] = [match[1], match[2], match[3]].map((part) => Number(part?.slice(0, -1) ?? 0));
  return (hours ?? 0) * 3600 + (minutes ?? 0) * 60 + (seconds ?? 0);
}

export const duration = withRules(z.string().min(1).max(18), [
  {
    cel: `self.matches('${DURATION}') && duration(self) <= duration('${DURATION_MAX_SECONDS}s')`,
    message: "write a duration of at most 24h such as 90s, 5m or 1h30m",
    holds: (text) => (durationSeconds(text) ?? Number.POSITIVE_INFINITY) <= DURATION_MAX_SECONDS,
  },
]);
