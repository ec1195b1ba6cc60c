// What tests of a bed ask of a deployment: that a group of it serves, and that what it says is what the reference model said.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type ChannelCredentials, credentials } from "@grpc/grpc-js";
import { expect } from "vitest";
import { z } from "zod";
import { type Chunk, Open, type SubmitResponse, WorkerClient } from "../../../proto/gen/muster/v1/worker.ts";
import { channelOptions } from "../../../proto/grpc.ts";
import { until } from "../../until.ts";
import type { Bed } from "./bed.ts";
import { controllerSaid } from "./controller.ts";

const ROOT = join(import.meta.dirname, "../../..");
const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const GAP_MIN = 1e-3;
/** nano-maverick by the name of `nano`; `spec` adds to what every test of it wants. */
export const nanoDeployment = (spec: Readonly<Record<string, unknown>>) => ({
  apiVersion: "muster.dev/v1alpha1",
  kind: "ModelDeployment",
  metadata: { name: "nano" },
  spec: {
    model: { source: "builtin://nano-maverick" },
    slo: { concurrency: 8 },
    rollout: { drainTimeout: "5s" },
    ...spec,
  },
});

/** Engines, a control plane and the test share a small machine. */
export const SERVE_MS_MAX = 180_000;

const Golden = z.object({
  greedy: z.array(
    z.object({
      prompt: z.string(),
      prompt_ids: z.array(z.number()),
      greedy: z.array(z.number()),
      min_top2_gap: z.number(),
      text: z.string(),
    }),
  ),
});
const Cause = z.looseObject({
  code: z.string(),
  message: z.string(),
  bytesLoaded: z.number().optional(),
  bytesTotal: z.number().optional(),
});
export const Group = z.looseObject({
  metadata: z.looseObject({ name: z.string(), uid: z.string() }),
  spec: z.looseObject({ owner: z.looseObject({ name: z.string() }) }),
  status: z
    .looseObject({
      phase: z.string().optional(),
      cause: Cause.optional(),
      incarnation: z.number().optional(),
      restarts: z.number().optional(),
      leader: z.string().optional(),
      placement: z.array(z.looseObject({ worker: z.number(), node: z.string(), pod: z.string() })).default([]),
    })
    .default({ placement: [] }),
});
export type Group = z.infer<typeof Group>;
export const Deployment = z.looseObject({
  status: z
    .looseObject({
      phase: z.string().optional(),
      conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })).default([]),
      cause: Cause.optional(),
    })
    .default({ conditions: [] }),
});

export async function groupsOf(bed: Bed, deployment: string): Promise<Group[]> {
  const { items } = await bed.plane.api.list(`${OURS}/replicagroups`);
  return items.map((item) => Group.parse(item)).filter(({ spec }) => spec.owner.name === deployment);
}

/** The group of the deployment once `isSo`; what is seen instead is in the error. */
export async function groupOnce(
  bed: Bed,
  deployment: string,
  { what, isSo }: { what: string; isSo: (group: Group) => boolean },
): Promise<Group> {
  let found: Group | undefined;
  const look = async () => {
    if (!bed.plane.processes.isRunning("controller"))
      throw new Error(`the controller has ended: ${controllerSaid(bed)}`);
    [found] = await groupsOf(bed, deployment);
    return found !== undefined && isSo(found);
  };
  await until(look, `${deployment} ${what}`, SERVE_MS_MAX).catch(async (error) => {
    const { status } = Deployment.parse(await bed.plane.api.find(`${OURS}/modeldeployments/${deployment}`));
    const pods = await bed.plane.kubectl(["get", "pods", "-o", "wide"]);
    const seen = `${JSON.stringify(status.cause)}; ${JSON.stringify(found?.status)}`;
    throw new Error(`${error.message}; ${seen}\n${pods.stdout}\n${controllerSaid(bed)}`);
  });
  return Group.parse(found);
}

export const serving = (bed: Bed, deployment: string): Promise<Group> =>
  groupOnce(bed, deployment, { what: "serves", isSo: ({ status }) => status.phase === "Serving" });

/** Prompts of nano-maverick's golden file whose greedy tokens no rounding can change, with those tokens. */
export function goldenPrompts(): z.infer<typeof Golden>["greedy"] {
  const golden = Golden.parse(JSON.parse(readFileSync(join(ROOT, "test/models/nano-maverick/golden.json"), "utf8")));
  const sure = golden.greedy.filter(({ min_top2_gap }) => min_top2_gap > GAP_MIN);
  expect(sure.length).toBeGreaterThan(0);
  return sure;
}

type Wish = { ids: number[]; maxTokens: number };
/** How the leader is reached; where trust is on, as somebody it takes. */
type Channel = ChannelCredentials;
const inClear = (): Channel => credentials.createInsecure();

/** What the group's leader answers to greedy requests that run beside each other, chunk by chunk. */
async function chunksOf(
  bed: Bed,
  { status }: Group,
  wishes: readonly Wish[],
  channel: Channel = inClear(),
): Promise<Chunk[][]> {
  const [address = "", port = ""] = status.leader?.split(":") ?? [];
  const forward = await bed.plane.space.forward(address, Number(port));
  const client = new WorkerClient(`127.0.0.1:${forward.port}`, channel, channelOptions);
  try {
    const call = client.submit();
    const chunks = wishes.map((): Chunk[] => []);
    for (const [id, { ids, maxTokens }] of wishes.entries()) {
      const input = { $case: "prompt", value: { ids } } as const;
      const open = Open.fromPartial({ id, input, maxTokens, ignoreEos: true, margins: true });
      call.write({ incarnation: BigInt(status.incarnation ?? 0), kind: { $case: "open", value: open } });
    }
    call.end();
    const responses: AsyncIterable<SubmitResponse> = call;
    for await (const response of responses) for (const chunk of response.chunks) chunks[chunk.id]?.push(chunk);
    return chunks;
  } finally {
    client.close();
    await forward.close();
  }
}

/** Greedy tokens and text of each prompt, as long as the golden ones, from the group's leader. */
export async function answersOf(
  bed: Bed,
  group: Group,
  channel?: Channel,
): Promise<{ tokens: number[]; text: string }[]> {
  const wishes = goldenPrompts().map(({ prompt_ids: ids, greedy }) => ({ ids, maxTokens: greedy.length }));
  return (await chunksOf(bed, group, wishes, channel)).map((of) => ({
    tokens: of.flatMap(({ tokens }) => tokens),
    text: of.map((chunk) => chunk.text).join(""),
  }));
}

/** Greedy tokens of one prompt, and how near each was to another one: the smallest of the gaps it was chosen by. */
export async function greedyOf(bed: Bed, group: Group, wish: Wish): Promise<{ tokens: number[]; gaps: number[] }> {
  const [chunks = []] = await chunksOf(bed, group, [wish]);
  const tokens = chunks.flatMap((chunk) => chunk.tokens);
  const gaps = chunks.flatMap(({ margins }) => margins.map(({ scoreGap, routerGap }) => Math.min(scoreGap, routerGap)));
  expect(gaps.length).toBe(tokens.length);
  return { tokens, gaps };
}

export async function expectGolden(bed: Bed, group: Group, channel?: Channel): Promise<void> {
  const expected = goldenPrompts().map(({ greedy, text }) => ({ tokens: greedy, text }));
  expect(await answersOf(bed, group, channel)).toEqual(expected);
}
