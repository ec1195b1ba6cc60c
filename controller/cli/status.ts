// `muster status`: what the runs of this user serve, each with its one cause.
import { credentials } from "@grpc/grpc-js";
import { Command } from "commander";
import pc from "picocolors";
import { ControlClient, Phase, type ServedModel, type WatchEvent } from "../../proto/gen/muster/v1/control.ts";
import { channelOptions } from "../../proto/grpc.ts";
import { findRuns } from "../local/run-folder.ts";

const ANSWER_TIMEOUT_MS = 2_000;

type Options = { json?: boolean; control?: string };

export function statusCommand(): Command {
  return new Command("status")
    .description("Shows what is served on this machine: plan, ready ranks, phase, its one cause and since when.")
    .option("--json", "one JSON object for each run, for scripts")
    .option("--control <target>", "a controller's address instead of the runs found here")
    .addHelpText("after", "\nExit codes: 0 something is up, 1 nothing is.")
    .action(async (options: Options) => {
      const targets = options.control ? [options.control] : findRuns().map((run) => run.control);
      const answers = await Promise.all(targets.map(async (target) => ({ target, state: await firstEvent(target) })));
      const up = answers.flatMap(({ target, state }) => (state ? [{ target, state }] : []));
      for (const { target, state } of up)
        console.log(options.json ? toJson(target, state) : toTable(state, Date.now()));
      if (up.length > 0) return;
      console.error("nothing is served here; start with `muster up builtin://nano-maverick`");
      process.exitCode = 1;
    });
}

/** The state a controller tells first; undefined where nobody answers (a run that died without tidying). */
function firstEvent(target: string): Promise<WatchEvent | undefined> {
  const client = new ControlClient(target, credentials.createInsecure(), channelOptions);
  return new Promise((done) => {
    const stream = client.watch({}, { deadline: Date.now() + ANSWER_TIMEOUT_MS });
    const finish = (event: WatchEvent | undefined) => {
      stream.cancel();
      client.close();
      done(event);
    };
    stream.on("data", finish);
    stream.on("error", () => finish(undefined));
    stream.on("end", () => finish(undefined));
  });
}

export const phaseName = (phase: Phase): string =>
  (Object.entries(Phase).find(([, value]) => value === phase)?.[0] ?? "UNKNOWN")
    .toLowerCase()
    .replaceAll(/(^|_)(\w)/g, (_all, _gap, letter: string) => letter.toUpperCase());

/** `tp2·ep2·etp1`, or `tp2` where no experts are dealt out. */
export const cutName = (cut: ServedModel["cut"]): string => {
  if (!cut) return "-";
  return cut.ep * cut.etp > 1 ? `tp${cut.tp}·ep${cut.ep}·etp${cut.etp}` : `tp${cut.tp}`;
};

function toJson(target: string, state: WatchEvent): string {
  return JSON.stringify({ target, ...state }, (key, value) => {
    if (typeof value === "bigint") return value.toString();
    return key === "phase" ? phaseName(value) : value;
  });
}

export function age(ms: number): string {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 120) return `${seconds}s`;
  return seconds < 7200 ? `${Math.floor(seconds / 60)}m` : `${Math.floor(seconds / 3600)}h`;
}

function toTable(state: WatchEvent, nowMs: number): string {
  const rows = [["MODEL", "PLAN", "READY", "PHASE", "RESTARTS", "AGE", "CAUSE"]];
  for (const model of state.models) {
    const since = age(nowMs - Number(model.sinceUnixMs));
    const ready = `${model.readyRanks}/${model.world}`;
    rows.push([model.name, cutName(model.cut), ready, phaseName(model.phase), `${model.restarts}`, since, model.cause]);
  }
  for (const draft of state.drafts)
    rows.push([draft.model, "draft", "", draft.up ? "Serving" : "Down", "", "", draft.detail]);
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  const lines = rows.map((row) =>
    row
      .map((cell, i) => cell.padEnd(widths[i] ?? 0))
      .join("  ")
      .trimEnd(),
  );
  return [pc.dim(lines[0] ?? ""), ...lines.slice(1)].join("\n");
}
