// What `muster up` says: plan and reasons, progress, how to talk to what is served. To people on standard error, the one JSON
// line for scripts on standard output.
import pc from "picocolors";
import { Phase } from "../../proto/gen/muster/v1/control.ts";
import { LedgerClass as Class, type LedgerClass, Reason_Kind, type ShardPlan } from "../../proto/gen/muster/v1/plan.ts";
import type { Progress } from "../model/model.ts";
import { bytesText, type GroupStatus } from "../reconcile/status.ts";
import { cutName, phaseName } from "./status.ts";

/** After these a draft is not waited for any longer: the model serves without it. */
const DRAFT_ENOUGH: readonly Phase[] = [Phase.SERVING, Phase.DEGRADED, Phase.INFEASIBLE, Phase.STOPPED];
const REDRAW_MS = 100;

export type Facts = { http: string; grpc: string; logs: string; run: string };

export class Teller {
  readonly #json: boolean;
  readonly #statuses = new Map<string, GroupStatus>();
  readonly #lines = new Map<string, string>();
  #isLineOpen = false;
  #drawnMs = 0;
  #wake: () => void = () => {};

  constructor(json: boolean) {
    this.#json = json;
  }

  say(line: string): void {
    if (this.#isLineOpen) process.stderr.write("\n");
    this.#isLineOpen = false;
    process.stderr.write(`${line}\n`);
  }

  download(progress: Progress): void {
    const { file, bytes, total } = progress;
    const now = performance.now();
    const isOver = bytes >= total;
    if (!isOver && now - this.#drawnMs < REDRAW_MS) return;
    this.#drawnMs = now;
    const line = `download ${file}: ${bytesText(BigInt(bytes))} of ${bytesText(BigInt(total))}`;
    if (!process.stderr.isTTY) {
      if (isOver) this.say(line);
      return;
    }
    process.stderr.write(`\r\x1b[K${line}`);
    this.#isLineOpen = true;
  }

  plan(plan: ShardPlan, role: string): void {
    const { model, cut, workers, contextTokens, kvBlocks, kvBlockTokens } = plan;
    const size = `${((model?.parameters ? Number(model.parameters) : 0) / 1e6).toFixed(2)} M parameters, ${model?.format}`;
    this.say(`${pc.bold(model?.name ?? "")} (${role}): ${size}`);
    const where = `${workers} worker${workers === 1 ? "" : "s"}`;
    this.say(
      `  plan ${plan.revision.slice(0, 12)}: ${cutName(cut)} on ${where}, context ${contextTokens}, ${kvBlocks} KV blocks of ${kvBlockTokens}`,
    );
    const fullest = [...plan.ledgers].sort((a, b) => Number(b.used - a.used))[0];
    if (fullest) {
      const weights = fullest.lines.filter((line) => isWeight(line.class)).reduce((sum, line) => sum + line.bytes, 0n);
      const kv = fullest.lines.find((line) => line.class === Class.KV)?.bytes ?? 0n;
      this.say(
        `  fullest rank: weights ${bytesText(weights)}, KV ${bytesText(kv)}, in all ${bytesText(fullest.used)} of ${bytesText(fullest.capacity)}`,
      );
    }
    for (const reason of plan.reasons) this.say(`  ${pc.dim(reasonMark(reason.kind))} ${reason.text}`);
  }

  status(name: string, status: GroupStatus): void {
    this.#statuses.set(name, status);
    this.#wake();
    const line = `${name}: ${phaseName(status.phase)} · ${status.cause}`;
    const key = `${status.phase}/${status.code}/${status.incarnation}`;
    if (process.stderr.isTTY && status.phase === Phase.LOADING) {
      process.stderr.write(`\r\x1b[K${line}`);
      this.#isLineOpen = true;
    } else if (this.#lines.get(name) !== key) this.say(line);
    this.#lines.set(name, key);
  }

  /** Resolves true when the model serves and the draft, where one is wished, serves or has given up; false on abort. */
  async ready(withDraft: boolean, signal: AbortSignal): Promise<boolean> {
    const isReady = () => {
      const draft = this.#statuses.get("draft");
      const others = [...this.#statuses].filter(([name]) => name !== "draft");
      const hasModel = others.some(([, status]) => status.phase === Phase.SERVING);
      return hasModel && (!withDraft || (draft !== undefined && DRAFT_ENOUGH.includes(draft.phase)));
    };
    while (!isReady() && !signal.aborted) {
      await new Promise<void>((wake) => {
        this.#wake = wake;
        signal.addEventListener("abort", () => wake(), { once: true });
      });
    }
    return !signal.aborted;
  }

  howToTalk(name: string, facts: Facts, hasKey: boolean): void {
    if (this.#json) process.stdout.write(`${JSON.stringify({ ...facts, model: name })}\n`);
    const key = hasKey ? ` -H "authorization: Bearer $MUSTER_API_KEY"` : "";
    const body = JSON.stringify({ model: name, prompt: "Mr. Speaker, Mr. President,", max_tokens: 48 });
    const call = JSON.stringify({ model: name, text: "Mr. Speaker", options: { max_tokens: 16 } });
    this.say("");
    this.say(`${pc.green("ready")}  HTTP ${facts.http}   gRPC ${facts.grpc}   logs ${facts.logs}`);
    this.say(`  curl ${facts.http}/v1/completions${key} -H 'content-type: application/json' -d '${body}'`);
    this.say(`  grpcurl -plaintext${key} -d '${call}' ${facts.grpc} muster.v1.Inference/Generate`);
    this.say(`  npx muster chat --url ${facts.http}`);
    this.say("Ctrl-C stops all of it.");
  }
}

const isWeight = (line: LedgerClass): boolean =>
  (
    [
      Class.EMBEDDING,
      Class.ATTENTION,
      Class.DENSE,
      Class.EXPERTS,
      Class.SHARED,
      Class.NORMS,
      Class.HEAD,
    ] as LedgerClass[]
  ).includes(line);

function reasonMark(kind: Reason_Kind): string {
  if (kind === Reason_Kind.CHOSEN) return "chosen   ";
  if (kind === Reason_Kind.RUNNER_UP) return "runner-up";
  if (kind === Reason_Kind.LIMIT) return "limit    ";
  return "note     ";
}
