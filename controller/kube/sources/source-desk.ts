// The planner's desk for sources that only pods can reach: a question goes to the planner when a pod has looked. Owns nothing of
// planning; what the desk answers to other questions passes through.
//
//   P4  no better plan is asked for where a pod would have to look again for it.
import type { Ask } from "../../reconcile/deployment/planning.ts";
import type { Question } from "../../reconcile/deployment/wish.ts";
import type { Answer } from "../../reconcile/deployment/world.ts";
import { type KubeObject, keyOf } from "../api/client.ts";
import type { PlanDesk } from "../owners/plan-desk.ts";
import type { Store } from "../watch/store.ts";
import { type Look, needsPod, type SourceLooks } from "./source-looks.ts";
import { termsText } from "./volumes.ts";

export type SourceDeskOptions = {
  desk: PlanDesk;
  /** Undefined: such sources go to the planner as they are. */
  looks: SourceLooks | undefined;
  stores: { deployments: Store; pools: Store };
  /** What is said of the key has changed. */
  onAnswer: (key: string) => void;
};

export class SourceDesk {
  readonly #options: SourceDeskOptions;
  readonly #seen = new Map<string, { hash: string; look: Look }>();

  constructor(options: SourceDeskOptions) {
    this.#options = options;
    options.looks?.subscribe((owner) => options.onAnswer(`${owner.kind}/${keyOf(owner)}`));
  }

  answerTo(key: string, question: Question): Answer | undefined {
    const answer = this.#options.desk.answerTo(key, question);
    const seen = this.#seen.get(key);
    if (seen?.hash !== question.hash) return answer;
    if (seen.look.kind === "not") return seen.look.answer;
    if (answer?.kind !== "infeasible" || seen.look.volume.length === 0) return answer;
    const text = `The volume of ${question.source.url} can be mounted only on nodes with ${termsText(seen.look.volume)}.`;
    return { ...answer, reasons: [{ code: "volume-nodes", text }, ...answer.reasons] };
  }

  better(key: string, question: Question) {
    return this.#options.desk.better(key, question);
  }

  forget(key: string): void {
    this.#seen.delete(key);
    this.#options.desk.forget(key);
  }

  idle(): Promise<void> {
    return this.#options.desk.idle();
  }

  ask(key: string, ask: Ask, what: "first" | "better", signal: AbortSignal): number | undefined {
    const { desk, looks, onAnswer } = this.#options;
    const { question, grounds } = ask;
    const owner = this.#ownerOf(key);
    if (looks === undefined || owner === undefined || !needsPod(question.source))
      return desk.ask(key, ask, what, signal);
    if (what === "better") return undefined;
    const before = this.#seen.get(key);
    const look = looks.lookFor(owner, question, grounds);
    this.#seen.set(key, { hash: question.hash, look });
    if (look.kind === "ready")
      return desk.ask(key, { ...ask, grounds: look.grounds, recording: look.recording }, what, signal);
    if (before?.hash !== question.hash || saidBy(before.look) !== saidBy(look)) onAnswer(key);
    return look.againMs;
  }

  /** `key`: "DraftPool/namespace/name". */
  #ownerOf(key: string): KubeObject | undefined {
    const { deployments, pools } = this.#options.stores;
    const [kind, ...rest] = key.split("/");
    return (kind === "DraftPool" ? pools : deployments).get(rest.join("/"));
  }
}

/** Times apart. */
function saidBy(look: Look): string {
  if (look.kind === "ready") return "";
  return JSON.stringify(look.answer, (name, value: unknown) => (name === "againMs" ? undefined : value));
}
