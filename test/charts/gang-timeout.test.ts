// A bound that chart and program both state: the chart takes what the program takes, and leaves what the program leaves.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { parse } from "yaml";
import { z } from "zod";
import { controllerCommand } from "../../controller/cli/controller.ts";
import { gangLimits } from "../../controller/kube/gangs/reservations.ts";

const CHART = join(import.meta.dirname, "../../charts/muster");
const file = (name: string) => readFileSync(join(CHART, name), "utf8");
const Values = z.object({ controller: z.object({ gangTimeoutSeconds: z.number() }) });
const Bounds = z.object({ type: z.literal("integer"), minimum: z.number(), maximum: z.number() });
const Schema = z.object({
  properties: z.object({ controller: z.object({ properties: z.object({ gangTimeoutSeconds: Bounds }) }) }),
});

const option = controllerCommand().options.find(({ long }) => long === "--gang-timeout");
const read = (value: unknown) => option?.parseArg?.(String(value), undefined);

test("T of a gang: the chart's default is the program's, and its schema has the program's bounds", () => {
  const { gangTimeoutSeconds } = Values.parse(parse(file("values.yaml"))).controller;
  expect(gangTimeoutSeconds).toBe(option?.defaultValue);
  expect(gangTimeoutSeconds * 1000).toBe(gangLimits.wholeMs);
  const { minimum, maximum } = Schema.parse(JSON.parse(file("values.schema.json"))).properties.controller.properties
    .gangTimeoutSeconds;
  for (const value of [minimum, maximum]) expect(read(value)).toBe(value);
  for (const value of [minimum - 1, maximum + 1, minimum + 0.5, "", "soon"])
    expect(() => read(value)).toThrow(`--gang-timeout: "${value}": write whole seconds, ${minimum} to ${maximum}`);
});
