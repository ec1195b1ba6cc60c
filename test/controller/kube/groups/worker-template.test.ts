// The file in which an installation says what worker pods are like.
import { expect, test } from "vitest";
import { parseTemplate, readTemplate } from "../../../../controller/kube/groups/worker-template.ts";

test("no file is the defaults; what a file says goes before them", () => {
  expect(readTemplate(undefined, "w@sha256:0")).toMatchObject({ image: "w@sha256:0", command: ["muster"], port: 7440 });
  const text = "port: 7000\nresources:\n  requests: { cpu: 8 }\n";
  expect(parseTemplate(text, "w")).toMatchObject({ port: 7000, resources: { requests: { cpu: 8 }, limits: {} } });
});

test("a wrong field, a file that is not there and what is no YAML are said by name", () => {
  expect(() => parseTemplate("drainSeconds: 601", "w")).toThrow("drainSeconds");
  expect(() => parseTemplate("image: other", "w")).toThrow("image");
  expect(() => parseTemplate("{", "w")).toThrow("YAML");
  expect(() => readTemplate("/nowhere/template.yaml", "w")).toThrow("/nowhere/template.yaml");
});
