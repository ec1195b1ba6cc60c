// Checks STYLE R1-R4 and R25 over the tracked tree: layout, sizes, import directions, leftovers, commit subjects, and that
// paths and npm scripts named in docs exist.
import { execFileSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { describe, expect, test } from "vitest";

const ROOT = join(import.meta.dirname, "..");
const LINES_MAX = 400;
const SUBJECT_MAX = 60;

const git = (...args: string[]) => execFileSync("git", args, { cwd: ROOT, encoding: "utf8", maxBuffer: 64 << 20 });
const files = [...new Set(git("ls-files", "--cached", "--others", "--exclude-standard").trim().split("\n"))].filter(
  (file) => existsSync(join(ROOT, file)),
);
const code = files.filter((file) => /\.(ts|mjs|cpp|h|cu|cuh|proto)$/.test(file) && !file.startsWith("proto/gen/"));
const text = (file: string) => readFileSync(join(ROOT, file), "utf8");

/** Where a TypeScript file of a room may import from, besides its own room and packages (R3). */
const MAY_IMPORT: Record<string, string[]> = {
  "controller/api": ["proto"],
  "controller/model": ["controller/api", "proto"],
  "controller/plan": ["controller/model", "controller/api", "proto"],
  "controller/reconcile": ["controller/plan", "controller/model", "controller/api", "proto"],
  "controller/local": ["controller/reconcile", "controller/plan", "controller/model", "controller/api", "proto"],
  "controller/kube": ["controller/reconcile", "controller/plan", "controller/model", "controller/api", "proto"],
  "controller/gateway": ["proto"],
  "worker/engine": ["proto"],
  "worker/token": ["proto"],
  "worker/kv": ["proto"],
  "worker/schedule": ["worker/kv", "proto"],
  "worker/spec": ["worker/engine", "worker/kv", "proto"],
  "worker/serve": ["worker/engine", "worker/token", "worker/kv", "worker/schedule", "worker/spec", "proto"],
};
const room = (file: string) =>
  file
    .split("/")
    .slice(0, file.startsWith("proto/") ? 1 : 2)
    .join("/");

describe("the tree is tidy", () => {
  test("R1: top-level folders are the rooms of the house", () => {
    const allowed = ["controller", "worker", "native", "proto", "charts", "test", ".ci"];
    const strangers = files.filter((file) => file.includes("/") && !allowed.includes(file.split("/")[0] ?? ""));
    expect(strangers).toEqual([]);
    const kinds = /\/(utils|helpers|common|managers|types|impl)(\/|\.)/;
    expect(code.filter((file) => kinds.test(file))).toEqual([]);
  });

  test("R2: no file is longer than its idea", () => {
    const long = code.filter((file) => {
      const content = text(file);
      return content.split("\n").length > LINES_MAX + 1 && !content.startsWith("// tidy: long because");
    });
    expect(long).toEqual([]);
  });

  test("R3: imports point one way", () => {
    const wrong: string[] = [];
    for (const file of code.filter((f) => /^(controller|worker)\/.*\.ts$/.test(f))) {
      const allowed = MAY_IMPORT[room(file)];
      if (!allowed) continue; // controller/cli wires everything
      for (const match of text(file).matchAll(/from "(\.[^"]+)"|import\("(\.[^"]+)"\)/g)) {
        const target = normalize(join(dirname(file), match[1] ?? match[2] ?? ""));
        if (room(target) !== room(file) && !allowed.includes(room(target))) wrong.push(`${file} -> ${target}`);
      }
    }
    expect(wrong).toEqual([]);
  });

  test("R3: only worker/engine/native.ts loads the addon", () => {
    const loads = code.filter(
      (file) => /^(controller|worker)\//.test(file) && /dlopen|createRequire|muster\.node/.test(text(file)),
    );
    const allowed = [
      "worker/engine/native.ts",
      "controller/cli/setup.mjs",
      "controller/cli/muster.mjs",
      "controller/cli/doctor.ts",
    ];
    expect(loads.filter((file) => !allowed.includes(file))).toEqual([]);
  });

  test("R4: no leftovers", () => {
    const leftover = /\b(TODO|FIXME|XXX)\b(?! #\d)|\bconsole\.debug\(|\b(describe|test|it)\.only\(/;
    expect(code.filter((file) => file !== "test/tidy.test.ts" && leftover.test(text(file)))).toEqual([]);
  });

  test("R25: commit subjects are `area: imperative`, short", () => {
    const subjects = git("log", "--no-merges", "--format=%s", "-200").trim().split("\n");
    expect(subjects.filter((s) => s.length > SUBJECT_MAX || !/^[a-z0-9/.,+ -]+: \S/.test(s))).toEqual([]);
  });

  test("docs: every path and npm script they name exists", () => {
    const scripts = Object.keys(JSON.parse(text("package.json")).scripts);
    const missing: string[] = [];
    for (const file of files.filter((f) => f.endsWith(".md"))) {
      for (const [, path] of text(file).matchAll(
        /`((?:controller|worker|native|proto|charts|test|\.ci)\/[\w./-]*[\w/])`/g,
      )) {
        if (path && !existsSync(join(ROOT, path))) missing.push(`${file}: ${path}`);
      }
      for (const [, script] of text(file).matchAll(/`npm run ([\w:-]+)/g))
        if (script && !scripts.includes(script)) missing.push(`${file}: npm run ${script}`);
    }
    expect(missing).toEqual([]);
  });
});
