// The `muster` program: finds the sub-command and runs it. Each command is imported only when it is asked for, so that a
// worker does not pay for the gateway's libraries.
//
// Exit codes: 0 done; 1 it failed; 2 the call is wrong; 3 the wish cannot be met (plan, up).
import { closeSync, createReadStream, readFileSync } from "node:fs";
import { Command, CommanderError } from "commander";
import { FaultError } from "../../proto/fault.ts";
import { Fault_Kind } from "../../proto/gen/muster/v1/worker.ts";

const COMMANDS: Record<string, { summary: string; load: () => Promise<Command> }> = {
  up: {
    summary: "serve a model on this machine: plan, workers, draft, gateway",
    load: async () => (await import("./up.ts")).upCommand(),
  },
  plan: {
    summary: "show how a model would be cut over given GPUs, and why",
    load: async () => (await import("./plan.ts")).planCommand(),
  },
  status: {
    summary: "what is served on this machine",
    load: async () => (await import("./status.ts")).statusCommand(),
  },
  chat: { summary: "talk to a model", load: async () => (await import("./chat.ts")).chatCommand() },
  eval: {
    summary: "logits and perplexity of given tokens",
    load: async () => (await import("./eval.ts")).evalCommand(),
  },
  doctor: {
    summary: "what is missing on this machine and how to get it",
    load: async () => (await import("./doctor.ts")).doctorCommand(),
  },
  worker: {
    summary: "one node's slice of a group (started by up or a pod)",
    load: async () => (await import("./worker.ts")).workerCommand(),
  },
  inspect: {
    summary: "read a model's headers for the controller (started by a pod)",
    load: async () => (await import("./inspect.ts")).inspectCommand(),
  },
  controller: {
    summary: "reconcile ModelDeployments on a Kubernetes cluster",
    load: async () => {
      const [{ controllerCommand }, { groupsPart }] = await Promise.all([
        import("./controller.ts"),
        import("../kube/groups/groups-part.ts"),
      ]);
      return controllerCommand((installation) => [groupsPart(installation)]);
    },
  },
  gateway: { summary: "the front door alone", load: async () => (await import("./gateway.ts")).gatewayCommand() },
};

const version: string = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")).version;

/** When the wrapper that started us dies without a word, its pipe ends, and so do we, as on a hang-up. */
function watchLifeline(): void {
  const fd = Number(process.env.MUSTER_LIFELINE_FD ?? 0);
  delete process.env.MUSTER_LIFELINE_FD;
  if (!fd) return;
  try {
    const pipe = createReadStream("", { fd, autoClose: false });
    pipe.on("end", () => process.kill(process.pid, "SIGTERM"));
    pipe.on("error", () => closeSync(fd));
    pipe.resume();
    process.on("exit", () => pipe.destroy());
    lifeline = pipe;
  } catch {
    // started in another way
  }
}
let lifeline: { destroy(): void } | undefined;

/** Usage errors of the command and its sub-commands come as exceptions instead of exits. */
function throwing(command: Command): Command {
  for (const sub of command.commands) throwing(sub);
  return command.exitOverride();
}

async function main(): Promise<void> {
  watchLifeline();
  const program = new Command("muster")
    .description("Serves large mixture-of-experts language models, cut over many devices; the same tokens, always.")
    .version(version)
    .showHelpAfterError()
    .exitOverride();
  const asked = process.argv[2] ?? "";
  const found = COMMANDS[asked];
  if (found) program.addCommand(throwing(await found.load()));
  else for (const [name, { summary }] of Object.entries(COMMANDS)) program.command(name).summary(summary);
  if (!asked) program.help({ error: true });
  await program.parseAsync();
}

try {
  await main();
} catch (error) {
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2;
  else {
    process.stderr.write(`muster: ${error instanceof Error ? error.message : String(error)}\n`);
    if (process.env.MUSTER_DEBUG) console.error(error);
    process.exitCode = error instanceof FaultError && error.fault.kind === Fault_Kind.INVALID ? 2 : 1;
  }
}
lifeline?.destroy();
// Clients that were closed may still hold a timer; the work is done, once what was written has left.
process.stdout.write("", () => process.stderr.write("", () => process.exit()));
