// What the groups of a plan were seen to give, kept in the status of its ShardPlan: the most tokens per second of one group, and
// how many sequences ran then. Owns the high-water mark; predictions and plans stay as they were stored.
import { parseReplicaGroup, parseShardPlan } from "../api/parse.ts";
import type { KubeObject } from "./client.ts";
import type { Clock } from "./clock.ts";
import { fieldsOf } from "./fields.ts";
import { isServingVoice, type ReportsBoard } from "./reports-board.ts";
import { shardPlans } from "./resources.ts";
import type { Lead, Part } from "./run-controller.ts";
import { StatusWriter } from "./status-writer.ts";

const LOOK_MS = 10_000;
/** Less than that is chance, and each mark is a write. */
const GAIN_MIN = 1.05;

export type MeasuredOptions = { board: ReportsBoard; clock: Clock; random: () => number };

type Mark = { tokensPerSecond: number; concurrency: number };

export function measuredPart({ board, clock, random }: MeasuredOptions): Part {
  return async ({ api, stores, term: { signal } }) => {
    const { groups, plans } = stores;
    const writer = new StatusWriter({
      api,
      resource: shardPlans,
      clock,
      random,
      headlineOf: () => "", // numbers alone
      onWritten: (object) => plans.learn(object),
      onConflict: () => {}, // the next look is with the newer one
      onRefused: () => {}, // the plan serves on; the next mark is offered anew
    });
    const look = async () => {
      while (!signal.aborted) {
        await clock.sleep(signal, clock.nowMs() + LOOK_MS);
        if (signal.aborted || !groups.isSynced || !plans.isSynced) continue;
        for (const [key, mark] of marksOf(board, groups)) {
          const plan = plans.get(key);
          const status = plan === undefined ? undefined : statusWith(plan, mark, clock.nowMs());
          if (plan !== undefined && status !== undefined) writer.offer(plan, status);
        }
      }
    };
    await Promise.all([writer.run(signal), look()]);
  };
}

/** The best of each plan's groups now, by the plan's key. */
function marksOf(board: ReportsBoard, groups: Lead["stores"]["groups"]): Map<string, Mark> {
  const marks = new Map<string, Mark>();
  for (const voice of board.voices().filter(isServingVoice)) {
    const object = groups.get(voice.group);
    const tokensPerSecond = board.numbersOf(voice.group, voice.incarnation)?.tokensPerSecond;
    const group = parseReplicaGroup(object);
    if (group.kind === "refused" || tokensPerSecond === undefined) continue;
    const key = `${group.value.metadata.namespace}/${group.value.spec.plan}`;
    const mark = { tokensPerSecond, concurrency: voice.report.stats?.running ?? 0 };
    if (tokensPerSecond > (marks.get(key)?.tokensPerSecond ?? 0)) marks.set(key, mark);
  }
  return marks;
}

/** Undefined where what is stored is as good, or cannot be read. */
function statusWith(plan: KubeObject, { tokensPerSecond, concurrency }: Mark, nowMs: number): unknown {
  const parsed = parseShardPlan(plan);
  if (parsed.kind === "refused") return undefined;
  const before = parsed.value.status?.measured;
  if (tokensPerSecond <= (before?.tokensPerSecond ?? 0) * GAIN_MIN) return undefined;
  const mark = { tokensPerSecond: Math.round(tokensPerSecond * 100) / 100, concurrency };
  return { ...fieldsOf(plan.status), measured: { ...before, at: new Date(nowMs).toISOString(), ...mark } };
}
