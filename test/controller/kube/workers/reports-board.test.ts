// What a board makes of reports: since when nothing moves, how fast, and whom to look at.
import { expect, test } from "vitest";
import { ReportsBoard } from "../../../../controller/kube/workers/reports-board.ts";
import { GroupReport } from "../../../../proto/gen/muster/v1/report.ts";
import { WorkerPhase, type WorkerStats } from "../../../../proto/gen/muster/v1/worker.ts";

const GROUP = "serving/chat-0";
const owner = { kind: "ModelDeployment", name: "chat" };

class Talk {
  nowMs = 1_000_000;
  readonly board = new ReportsBoard(() => this.nowMs);
  readonly told: string[] = [];

  constructor() {
    this.board.subscribe((group) => this.told.push(group));
  }

  say(
    changes: {
      rankEpochs?: bigint[];
      pending?: boolean;
      standingMs?: number;
      stats?: Partial<WorkerStats>;
      phase?: WorkerPhase;
    },
    incarnation = 1n,
  ) {
    const report = GroupReport.fromPartial({ phase: WorkerPhase.SERVING, ...changes });
    this.board.hear({ group: GROUP, incarnation, owner }, report);
  }

  later(ms: number): void {
    this.nowMs += ms;
  }

  get standingMs(): number | undefined {
    const steps = this.board.stepsOf(GROUP, 1n);
    return steps && this.nowMs - steps.sinceMs;
  }
}

test("standing still is counted while work is pending, from the last step that any rank has finished", () => {
  const talk = new Talk();
  talk.say({ pending: false, rankEpochs: [4n, 4n] });
  talk.later(60_000);
  talk.say({ pending: true, rankEpochs: [4n, 4n] });
  expect(talk.standingMs).toBe(0); // it has just begun
  talk.later(1_000);
  talk.say({ pending: true, rankEpochs: [5n, 4n] });
  expect(talk.standingMs).toBe(0);
  talk.later(1_000);
  talk.say({ pending: true, rankEpochs: [5n, 4n] });
  talk.later(1_000);
  talk.say({ pending: true, rankEpochs: [5n, 4n] });
  expect(talk.standingMs).toBe(2_000);
  expect(talk.board.suspects()).toEqual([GROUP]);
  talk.say({ pending: true, rankEpochs: [6n, 4n] });
  talk.later(1_400); // nobody speaks any more
  expect(talk.standingMs).toBe(1_400);
  expect(talk.board.suspects()).toEqual([]);
  talk.later(100);
  expect(talk.board.suspects()).toEqual([GROUP]);
  talk.say({ pending: true, rankEpochs: [5n, 5n] });
  expect(talk.standingMs).toBe(0);
  talk.later(10_000);
  talk.say({ pending: false, rankEpochs: [5n, 5n] });
  expect(talk.standingMs).toBe(0);
  expect(talk.board.suspects()).toEqual([]);
});

test("a leader that says how long it stands still is believed: its reports are further apart than its looks", () => {
  const talk = new Talk();
  talk.say({ pending: true, rankEpochs: [5n, 4n] });
  talk.later(1_000);
  talk.say({ pending: true, rankEpochs: [6n, 5n], standingMs: 800 });
  expect(talk.standingMs).toBe(800);
  talk.later(700);
  expect(talk.board.suspects()).toEqual([GROUP]);
  talk.later(300);
  talk.say({ pending: true, rankEpochs: [6n, 5n], standingMs: 1_700 }); // it came a little late
  expect(talk.standingMs).toBe(1_800);
  talk.say({ pending: true, rankEpochs: [6n, 6n], standingMs: 0 });
  expect(talk.standingMs).toBe(0);
  talk.say({ pending: false, rankEpochs: [6n, 6n], standingMs: 900 });
  expect(talk.standingMs).toBe(0);
});

test("B1: a newer incarnation takes the place of an older one, never the other way round", () => {
  const talk = new Talk();
  talk.say({ rankEpochs: [9n] }, 1n);
  talk.say({ rankEpochs: [1n] }, 2n);
  expect(talk.board.stepsOf(GROUP, 1n)).toBeUndefined();
  expect(talk.board.stepsOf(GROUP, 2n)).toMatchObject({ epochs: [1n] });
  talk.say({ rankEpochs: [10n] }, 1n);
  talk.board.lose({ group: GROUP, incarnation: 1n, owner });
  expect(talk.board.stepsOf(GROUP, 2n)).toMatchObject({ epochs: [1n], isHeard: true });
});

test("B2: what was said stays known when the stream breaks off; listeners hear of streams and phases, not of numbers", () => {
  const talk = new Talk();
  talk.say({ phase: WorkerPhase.LOADING });
  talk.say({ phase: WorkerPhase.SERVING, rankEpochs: [1n] });
  for (const step of [2n, 3n, 4n]) talk.say({ rankEpochs: [step], pending: true });
  expect(talk.told).toHaveLength(2);
  talk.board.lose({ group: GROUP, incarnation: 1n, owner });
  expect(talk.told).toHaveLength(3);
  expect(talk.board.stepsOf(GROUP, 1n)).toMatchObject({ epochs: [4n], isPending: true, isHeard: false });
  expect(talk.board.suspects()).toEqual([GROUP]);
  expect(talk.board.voices()).toEqual([]);
});

test("tokens per second are over the last ten seconds; what is old says nothing; a step is what all ranks have finished", () => {
  const talk = new Talk();
  const at = (seconds: number) => ({ tokensGenerated: BigInt(seconds * 50) });
  talk.say({ stats: at(0), rankEpochs: [1n, 1n] });
  expect(talk.board.numbersOf(GROUP, 1n)?.tokensPerSecond).toBeUndefined();
  for (let second = 1; second <= 30; second++) {
    talk.later(1_000);
    talk.say({ stats: at(second), rankEpochs: [BigInt(second + 1), BigInt(second)] });
  }
  expect(talk.board.numbersOf(GROUP, 1n)).toMatchObject({ tokensPerSecond: 50, step: 30n, stepMs: talk.nowMs });
  for (let second = 1; second <= 4; second++) {
    talk.later(5_000); // idle: nothing is added
    talk.say({ stats: at(30), rankEpochs: [31n, 30n] });
  }
  expect(talk.board.numbersOf(GROUP, 1n)?.tokensPerSecond).toBe(0);
  talk.later(21_000);
  expect(talk.board.numbersOf(GROUP, 1n)?.tokensPerSecond).toBeUndefined();
  expect(talk.board.voices()).toEqual([]);
});

test("a rate is over ten whole seconds: tokens, what steps give without guesses, and sequences at once on average", () => {
  const talk = new Talk();
  const rate = () => talk.board.rateOf(GROUP, 1n);
  for (let second = 0; second <= 20; second++) {
    const running = second < 10 ? 0 : 4;
    talk.say({ stats: { tokensGenerated: BigInt(30 * second), accepted: BigInt(10 * second), running } });
    if (second < 10) expect(rate()).toBeUndefined();
    if (second === 10) expect(rate()?.concurrency).toBeCloseTo(0.2);
    talk.later(1_000);
  }
  expect(rate()).toEqual({ tokensPerSecond: 30, plainPerSecond: 20, concurrency: 4 });
  expect(talk.board.rateOf(GROUP, 2n)).toBeUndefined();
  talk.later(20_000);
  expect(rate()).toBeUndefined();
});
