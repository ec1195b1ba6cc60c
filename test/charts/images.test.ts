// The Dockerfiles as far as they can be judged without building them: where layers come from, who runs, what is copied.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";

const ROOT = join(import.meta.dirname, "../..");
const FOLDER = join(ROOT, "charts/images");
const files = readdirSync(FOLDER).filter((name) => name.endsWith(".Dockerfile"));
type Instruction = { word: string; rest: string };

function instructions(name: string): Instruction[] {
  const text = readFileSync(join(FOLDER, name), "utf8")
    .replaceAll(/^#.*\n/gm, "")
    .replaceAll(/\\\n/g, " ");
  return text.split("\n").flatMap((line) => {
    const [, word, rest] = /^([A-Z]+) +(.+)$/.exec(line) ?? [];
    return word && rest ? [{ word, rest }] : [];
  });
}
const of = (name: string, word: string) =>
  instructions(name).flatMap((each) => (each.word === word ? [each.rest] : []));

describe.each(files)("%s", (name) => {
  test("every base image is an argument without a default, so that whoever builds pins it by digest", () => {
    const args = of(name, "ARG");
    expect(args.length).toBeGreaterThan(0);
    expect(args.filter((arg) => arg.includes("="))).toEqual([]);
    const stages = of(name, "FROM").map((from) => / AS (\S+)$/.exec(from)?.[1]);
    for (const from of of(name, "FROM")) {
      const [image = ""] = from.split(" ");
      const argument = /^\$\{(\w+)\}$/.exec(image)?.[1];
      expect(argument === undefined ? stages.includes(image) : args.includes(argument), from).toBe(true);
    }
  });

  test("the last of several stages runs `muster` as a user that is not root, by number", () => {
    expect(of(name, "FROM").length).toBeGreaterThan(1);
    const last = instructions(name).slice(instructions(name).findLastIndex(({ word }) => word === "FROM"));
    expect(last.filter(({ word }) => word === "USER").map(({ rest }) => rest)).toEqual(["65532:65532"]);
    expect(last.at(-1)).toEqual({ word: "ENTRYPOINT", rest: '["muster"]' });
  });

  test("that user has a name and a home that can be written, which `muster up` asks for", () => {
    const [user = ""] = of(name, "USER");
    const passwd = of(name, "RUN").filter((run) => run.endsWith(">> /etc/passwd"));
    expect(passwd).toEqual([expect.stringContaining(`'muster:x:${user}:muster:/tmp:`)]);
    const after = instructions(name).slice(instructions(name).findIndex(({ word }) => word === "USER"));
    expect(after[1]).toEqual({ word: "RUN", rest: expect.stringMatching(/^muster --version/) }); // tried as that user
  });

  test("what is copied from the checkout is there and let through by the ignore file, and nothing else is", () => {
    const ignore = readFileSync(join(FOLDER, `${name}.dockerignore`), "utf8").split("\n");
    const copied: string[] = [];
    for (const copy of of(name, "COPY").filter((rest) => !rest.includes("--from="))) {
      const sources = copy
        .split(" ")
        .filter((word) => !word.startsWith("--"))
        .slice(0, -1);
      for (const source of sources) {
        expect(existsSync(join(ROOT, source)), `${name}: COPY ${source}`).toBe(true);
        expect(ignore, `${name}: COPY ${source}`).toContain(`!${source}`);
      }
      copied.push(...sources);
    }
    expect(ignore[0]).toBe("*");
    expect(ignore.filter((line) => line.startsWith("!")).toSorted()).toEqual(
      copied.map((path) => `!${path}`).toSorted(),
    );
  });
});

test("both images are there", () => {
  expect(files.toSorted()).toEqual(["control.Dockerfile", "worker.Dockerfile"]);
});
