// What a user may change of the pods made for a model: an allow-list. Owns the list and why each thing is bounded; a dry-run
// create by the controller has the last word, because what a namespace admits is not known here.
//
//   Never: service account, volumes, secrets as env, security context, GPU counts (the plan's), labels of muster.dev.
import { z } from "zod";
import { annotationMap, labelMap, listBy, objectName, quantity, tolerations } from "./fields.ts";
import { GROUP } from "./meta.ts";
import { type Rule, withRules } from "./rules.ts";

const ENV_MAX = 64;
const ENV_VALUE_MAX = 4096;
const PULL_SECRETS_MAX = 8;
const RESOURCES_MAX = 16;
/** The only place of a host a pod may be given: an administrator mounts or links the disk there. */
export const HOST_CACHE = "/var/cache/muster";

const notOurs: Rule<Record<string, string>> = {
  cel: `self.all(key, !key.startsWith('${GROUP}/'))`,
  message: `keys under ${GROUP}/ are written by the controller: use a prefix of your own`,
  holds: (map) => Object.keys(map).every((key) => !key.startsWith(`${GROUP}/`)),
};

const QUEUE_PREFIXES = ["kueue.x-k8s.io/", "scheduling.x-k8s.io/", "kai.scheduler/", "volcano.sh/"];

const queueOnly: Rule<Record<string, string>> = {
  cel: `self.all(key, ${QUEUE_PREFIXES.map((prefix) => `key.startsWith('${prefix}')`).join(" || ")})`,
  message: `queueLabels takes keys of ${QUEUE_PREFIXES.join(", ")}: put other labels under podPatch.labels`,
  holds: (map) => Object.keys(map).every((key) => QUEUE_PREFIXES.some((prefix) => key.startsWith(prefix))),
};

const ENV_NAME = "^[A-Za-z_][A-Za-z0-9_]*$";
const isEnvName = new RegExp(ENV_NAME);
/** They would change what the program is, not how it is tuned. */
const ENV_RESERVED = ["MUSTER_", "LD_", "NODE_OPTIONS"];

const env = withRules(z.strictObject({ name: z.string().min(1).max(128), value: z.string().max(ENV_VALUE_MAX) }), [
  {
    cel: `self.name.matches('${ENV_NAME}')`,
    message: "write a variable name of letters, digits and _, such as NCCL_DEBUG",
    holds: ({ name }) => isEnvName.test(name),
    at: "name",
  },
  {
    cel: ENV_RESERVED.map((prefix) => `!self.name.startsWith('${prefix}')`).join(" && "),
    message: `variables that begin with ${ENV_RESERVED.join(", ")} are the controller's: remove this one`,
    holds: ({ name }) => ENV_RESERVED.every((prefix) => !name.startsWith(prefix)),
    at: "name",
  },
]);

const resourceMap = withRules(
  z
    .record(z.string(), quantity)
    .refine((map) => Object.keys(map).length <= RESOURCES_MAX, { message: `at most ${RESOURCES_MAX} resources` })
    .meta({ maxProperties: RESOURCES_MAX }),
  [
    {
      cel: "self.all(key, !key.startsWith('nvidia.com/') && !key.startsWith('amd.com/'))",
      message: "the plan sets the GPUs of a pod: remove this resource and write spec.gpu.count",
      holds: (map) => Object.keys(map).every((key) => !key.startsWith("nvidia.com/") && !key.startsWith("amd.com/")),
    },
  ],
);

const hostCache = withRules(z.strictObject({ path: z.string().min(1).max(256).default(HOST_CACHE) }), [
  {
    cel: `(self.path == '${HOST_CACHE}' || self.path.startsWith('${HOST_CACHE}/')) && !self.path.contains('..')`,
    message: `a host cache lies at ${HOST_CACHE} or below: write such a path and mount or link the disk there`,
    holds: ({ path }) => (path === HOST_CACHE || path.startsWith(`${HOST_CACHE}/`)) && !path.includes(".."),
    at: "path",
  },
]);

export const podPatch = z
  .strictObject({
    labels: labelMap(notOurs).optional(),
    annotations: annotationMap(notOurs).optional(),
    queueLabels: labelMap(queueOnly).optional().describe("Labels by which a queue admits pods."),
    env: listBy(env, "name", ENV_MAX).optional(),
    resources: z
      .strictObject({ requests: resourceMap.optional(), limits: resourceMap.optional() })
      .optional()
      .describe("CPU, memory and others of one pod; GPUs come from the plan."),
    tolerations: tolerations.optional(),
    priorityClassName: objectName("a PriorityClass").optional(),
    imagePullSecrets: listBy(
      z.strictObject({ name: objectName("a Secret of this namespace") }),
      "name",
      PULL_SECRETS_MAX,
    ).optional(),
    hostCache: hostCache.optional().describe("Keep pulled weights on the node, for other pods and restarts."),
    ipcLock: z.boolean().default(false).describe("Add IPC_LOCK: pinned memory for RDMA."),
  })
  .describe("What may be changed of the pods; a dry-run create checks it and status says what it answered.");
export type PodPatch = z.infer<typeof podPatch>;
