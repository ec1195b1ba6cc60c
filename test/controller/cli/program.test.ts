// The program as scripts and newcomers meet it: help, exit codes, what goes to which stream.
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { muster } from "./run.ts";

const ROOT = join(import.meta.dirname, "../../..");

describe("muster", () => {
  test("--help names every command on standard output; no command is a usage error", async () => {
    const help = await muster("--help");
    expect(help.code).toBe(0);
    for (const name of ["up", "plan", "status", "chat", "eval", "doctor", "worker", "gateway"]) {
      expect(help.out).toMatch(new RegExp(`^  ${name} `, "m"));
    }
    expect((await muster()).code).toBe(2);
  });

  test("an unknown command or option is named and exits with 2", async () => {
    const command = await muster("serve");
    expect(command.code).toBe(2);
    expect(command.err).toContain("serve");
    const option = await muster("up", "builtin://nano-draft", "--gpus", "8");
    expect(option.code).toBe(2);
    expect(option.err).toContain("--gpus");
  });

  test("every command has help of its own", async () => {
    const commands = ["up", "plan", "status", "chat", "eval", "doctor", "worker", "gateway"];
    const said = await Promise.all(commands.map((name) => muster(name, "--help")));
    for (const [i, { code, out }] of said.entries()) {
      expect(code, commands[i]).toBe(0);
      expect(out).toContain("Usage:");
    }
  });

  test("doctor finds this checkout in order", async () => {
    const { code, out } = await muster("doctor", "--json");
    const findings: { part: string; state: string }[] = JSON.parse(out);
    expect(findings.filter(({ state }) => state === "missing")).toEqual([]);
    expect(code).toBe(0);
  });

  test("status with nobody there exits with 1 and says what to do", async () => {
    const { code, out, err } = await muster("status", "--control", "unix:/no/such.sock");
    expect(code).toBe(1);
    expect(out).toBe("");
    expect(err).toContain("muster up");
  });

  test("the plain JavaScript bin re-executes the checkout's own Node and hands its exit code on", () => {
    const bin = join(ROOT, "controller/cli/muster.mjs");
    const said = spawnSync("/usr/bin/env", ["node", bin, "plan", "nonsense"], { encoding: "utf8" });
    expect(said.status).toBe(2);
    expect(said.stderr).toContain("nonsense");
  });
});

describe("set-up", () => {
  test("with nothing to do it says so for each step and does nothing", () => {
    const setup = join(ROOT, "controller/cli/setup.mjs");
    const said = spawnSync("node", [setup], { encoding: "utf8" });
    expect(said.status).toBe(0);
    for (const step of ["packages", "tools", "proto", "native"]) {
      expect(said.stderr).toMatch(new RegExp(`^setup: ${step} +up to date`, "m"));
    }
  });
});
