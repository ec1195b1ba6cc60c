// DraftPool: small models that guess ahead for all targets of their vocabulary.
import { z } from "zod";
import { cause, conditions, phase } from "./conditions.ts";
import { count, listOf } from "./fields.ts";
import { gpu, model, notices, REPLICAS_MAX } from "./model-deployment.ts";
import { podPatch } from "./pod-patch.ts";
import { withRules } from "./rules.ts";
import { vocabulary } from "./vocabulary.ts";

const VOCABULARIES_MAX = 16;
const fields = z.strictObject({
  model,
  replicas: z.int().min(0).max(REPLICAS_MAX).default(1),
  vocabularies: listOf(vocabulary, VOCABULARIES_MAX)
    .min(1)
    .optional()
    .describe("Which vocabularies it may serve; left out: its model's own. A model of another one is refused."),
  gpu: gpu.optional(),
  podPatch: podPatch.optional(),
});

export const draftPoolSpec = withRules(fields, [
  {
    cel:
      "!has(self.gpu) || ((!has(self.gpu.count) || self.gpu.count == 1) && (!has(self.gpu.topology) || " +
      "!has(self.gpu.topology.nodes) || self.gpu.topology.nodes == 1))",
    message: "a draft runs on one GPU of one node: write 1, or leave count and nodes out, and write more replicas",
    holds: ({ gpu: wish }) => (wish?.count ?? 1) === 1 && (wish?.topology?.nodes ?? 1) === 1,
    at: "gpu",
  },
]);
export type DraftPoolSpec = z.infer<typeof draftPoolSpec>;
export type DraftPoolSpecInput = z.input<typeof draftPoolSpec>;

const TARGETS_MAX = 256;

export const draftPoolStatus = z.object({
  observedGeneration: count.optional(),
  phase: phase.optional(),
  cause: cause.optional(),
  conditions: conditions.optional(),
  vocabulary: z.string().max(16).optional(),
  planName: z.string().max(253).optional(),
  revision: z.string().max(64).optional(),
  selector: z.string().max(1024).optional(),
  replicas: count.optional(),
  readyReplicas: count.optional(),
  nextOrdinal: count.optional().describe("Ordinals of ReplicaGroups below it have been used."),
  ready: z.string().max(32).optional(),
  targets: listOf(z.string().max(253), TARGETS_MAX).optional().describe("ModelDeployments that it drafts for."),
  notices: notices.optional(),
});
export type DraftPoolStatus = z.infer<typeof draftPoolStatus>;
