// `muster doctor`: looks at this machine and says, part by part, what is there, what is missing and how to get it.
import { spawnSync } from "node:child_process";
import { existsSync, statfsSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { Command } from "commander";
import pc from "picocolors";
import { findNatsServer } from "../local/nats.ts";
import { runsFolder } from "../local/run-folder.ts";

const ROOT = resolve(fileURLToPath(import.meta.url), "../../..");
const FREE_BYTES_MIN = 2e9;

type Finding = { part: string; state: "good" | "missing" | "optional"; detail: string; remedy: string };

export function doctorCommand(): Command {
  return new Command("doctor")
    .description("Checks what Muster needs on this machine and says how to get what is missing.")
    .option("--json", "findings as JSON, for scripts")
    .addHelpText("after", "\nExit codes: 0 all that is needed is there, 1 something is missing.")
    .action(async (options: { json?: boolean }) => {
      const findings = await examine();
      if (options.json) console.log(JSON.stringify(findings));
      else for (const finding of findings) console.log(lineOf(finding));
      if (findings.some((finding) => finding.state === "missing")) process.exitCode = 1;
    });
}

function lineOf({ part, state, detail, remedy }: Finding): string {
  const mark =
    state === "good" ? pc.green("ok      ") : state === "missing" ? pc.red("missing ") : pc.yellow("optional");
  return `${mark} ${part.padEnd(14)} ${detail}${state === "good" ? "" : `\n${" ".repeat(24)}${remedy}`}`;
}

async function examine(): Promise<Finding[]> {
  const setup = "run: npm run setup";
  const hasAddon = existsSync(join(ROOT, "native/build/muster.node"));
  const found = (part: string, isThere: boolean, detail: string, remedy: string): Finding => ({
    part,
    state: isThere ? "good" : "missing",
    detail: isThere ? detail : "not found",
    remedy,
  });
  return [
    found("system", process.platform === "linux", `linux ${process.arch}`, "Muster runs on Linux only"),
    found("node", true, process.version, ""),
    compilerFinding(hasAddon),
    found("addon", hasAddon, "native/build/muster.node", setup),
    found("proto code", existsSync(join(ROOT, "proto/gen")), "proto/gen", setup),
    await deviceFinding(),
    natsFinding(setup),
    folderFinding(),
    diskFinding(),
    gpuFinding(),
  ];
}

/** What is built already (an image) needs none. */
function compilerFinding(isBuilt: boolean): Finding {
  const said = spawnSync("g++", ["--version"], { encoding: "utf8" });
  const detail = said.stdout?.split("\n")[0] || "not found";
  const remedy = "run: apt-get install g++ (needed to build native/)";
  const state = said.status === 0 ? "good" : isBuilt ? "optional" : "missing";
  return { part: "C++ compiler", state, detail, remedy };
}

function natsFinding(setup: string): Finding {
  const path = findNatsServer();
  const state = path === undefined ? "optional" : "good";
  return { part: "nats-server", state, detail: path ?? "not found", remedy: `${setup} (only speculation needs it)` };
}

async function deviceFinding(): Promise<Finding> {
  try {
    const { devices } = await import("../../worker/engine/native.ts");
    const { cpu, cpus, isas } = devices();
    return { part: "cpu", state: "good", detail: `${cpu}, ${cpus} usable, kernels: ${isas.join(", ")}`, remedy: "" };
  } catch (error) {
    const detail = error instanceof Error ? error.message : String(error);
    return { part: "cpu", state: "missing", detail, remedy: "run: npm run setup" };
  }
}

function folderFinding(): Finding {
  try {
    return { part: "run folder", state: "good", detail: runsFolder(), remedy: "" };
  } catch (error) {
    const detail = error instanceof Error ? error.message : String(error);
    return {
      part: "run folder",
      state: "missing",
      detail,
      remedy: "remove that folder or set TMPDIR to one of your own",
    };
  }
}

function diskFinding(): Finding {
  const { bavail, bsize } = statfsSync(ROOT);
  const free = bavail * bsize;
  const detail = `${(free / 1e9).toFixed(0)} GB free`;
  return { part: "disk", state: free > FREE_BYTES_MIN ? "good" : "missing", detail, remedy: "free some space" };
}

function gpuFinding(): Finding {
  const said = spawnSync("nvidia-smi", ["--query-gpu=name", "--format=csv,noheader"], {
    encoding: "utf8",
    timeout: 10_000,
  });
  const names = said.status === 0 ? said.stdout.trim().split("\n") : [];
  const detail = names.length > 0 ? `${names.join(", ")} (not used: the CUDA backend is not there yet)` : "none seen";
  return { part: "gpu", state: "optional", detail, remedy: "this version computes on the CPU" };
}
