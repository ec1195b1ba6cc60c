// The parts of a Pod that the process kubelet obeys, parsed from the API server's JSON. What is not here is not obeyed:
// images (a process has none; see entrypoints), security contexts but for user and group, host ports, lifecycle.postStart,
// ephemeral containers.
import { z } from "zod";

const IntOrString = z.union([z.int(), z.string()]);
const HttpGet = z.looseObject({
  path: z.string().default("/"),
  port: IntOrString,
  httpHeaders: z.array(z.looseObject({ name: z.string(), value: z.string() })).default([]),
});
const Exec = z.looseObject({ command: z.array(z.string()).default([]) });

const Probe = z.looseObject({
  exec: Exec.optional(),
  httpGet: HttpGet.optional(),
  tcpSocket: z.looseObject({ port: IntOrString }).optional(),
  grpc: z.looseObject({ port: z.int(), service: z.string().default("") }).optional(),
  initialDelaySeconds: z.number().default(0),
  periodSeconds: z.number().default(10),
  timeoutSeconds: z.number().default(1),
  successThreshold: z.number().default(1),
  failureThreshold: z.number().default(3),
});
export type Probe = z.infer<typeof Probe>;

const Security = z.looseObject({ runAsUser: z.int().optional(), runAsGroup: z.int().optional() }).optional();

const KeyRef = z.looseObject({ name: z.string(), key: z.string(), optional: z.boolean().default(false) });
const SourceRef = z.looseObject({ name: z.string(), optional: z.boolean().default(false) });
const EnvVar = z.looseObject({
  name: z.string(),
  value: z.string().optional(),
  valueFrom: z
    .looseObject({
      fieldRef: z.looseObject({ fieldPath: z.string() }).optional(),
      resourceFieldRef: z.looseObject({ resource: z.string() }).optional(),
      configMapKeyRef: KeyRef.optional(),
      secretKeyRef: KeyRef.optional(),
    })
    .optional(),
});
const EnvFrom = z.looseObject({
  prefix: z.string().default(""),
  configMapRef: SourceRef.optional(),
  secretRef: SourceRef.optional(),
});

const Container = z.looseObject({
  name: z.string(),
  image: z.string().default(""),
  command: z.array(z.string()).default([]),
  args: z.array(z.string()).default([]),
  workingDir: z.string().default("/"),
  env: z.array(EnvVar).default([]),
  envFrom: z.array(EnvFrom).default([]),
  ports: z.array(z.looseObject({ name: z.string().optional(), containerPort: z.int() })).default([]),
  resources: z
    .looseObject({
      limits: z.record(z.string(), z.coerce.string()).default({}),
      requests: z.record(z.string(), z.coerce.string()).default({}),
    })
    .default({ limits: {}, requests: {} }),
  volumeMounts: z
    .array(
      z.looseObject({
        name: z.string(),
        mountPath: z.string(),
        subPath: z.string().default(""),
        readOnly: z.boolean().default(false),
      }),
    )
    .default([]),
  readinessProbe: Probe.optional(),
  livenessProbe: Probe.optional(),
  startupProbe: Probe.optional(),
  lifecycle: z
    .looseObject({
      preStop: z
        .looseObject({
          exec: Exec.optional(),
          httpGet: HttpGet.optional(),
          sleep: z.looseObject({ seconds: z.number() }).optional(),
        })
        .optional(),
    })
    .optional(),
  terminationMessagePath: z.string().default("/dev/termination-log"),
  terminationMessagePolicy: z.string().default("File"),
  restartPolicy: z.string().optional(),
  securityContext: Security,
});
export type Container = z.infer<typeof Container>;

const Items = z.array(z.looseObject({ key: z.string(), path: z.string() })).optional();
const ConfigMapSource = z.looseObject({ name: z.string(), items: Items, optional: z.boolean().default(false) });
const FieldItems = z
  .array(z.looseObject({ path: z.string(), fieldRef: z.looseObject({ fieldPath: z.string() }).optional() }))
  .default([]);
const Projection = z.looseObject({
  configMap: ConfigMapSource.optional(),
  secret: ConfigMapSource.optional(),
  downwardAPI: z.looseObject({ items: FieldItems }).optional(),
  serviceAccountToken: z
    .looseObject({ audience: z.string().default(""), expirationSeconds: z.number().default(3600), path: z.string() })
    .optional(),
  podCertificate: z
    .looseObject({ signerName: z.string(), keyType: z.string(), credentialBundlePath: z.string() })
    .optional(),
});
export type Projection = z.infer<typeof Projection>;

const Volume = z.looseObject({
  name: z.string(),
  emptyDir: z.looseObject({ medium: z.string().default("") }).optional(),
  hostPath: z.looseObject({ path: z.string() }).optional(),
  persistentVolumeClaim: z.looseObject({ claimName: z.string(), readOnly: z.boolean().default(false) }).optional(),
  configMap: ConfigMapSource.optional(),
  secret: z.looseObject({ secretName: z.string(), items: Items, optional: z.boolean().default(false) }).optional(),
  downwardAPI: z.looseObject({ items: FieldItems }).optional(),
  projected: z.looseObject({ sources: z.array(Projection).default([]) }).optional(),
});
export type Volume = z.infer<typeof Volume>;

export const Pod = z.looseObject({
  metadata: z.looseObject({
    name: z.string(),
    namespace: z.string(),
    uid: z.string(),
    labels: z.record(z.string(), z.string()).default({}),
    annotations: z.record(z.string(), z.string()).default({}),
    deletionTimestamp: z.string().optional(),
    deletionGracePeriodSeconds: z.number().optional(),
  }),
  spec: z.looseObject({
    nodeName: z.string(),
    hostname: z.string().optional(),
    subdomain: z.string().optional(),
    serviceAccountName: z.string().default("default"),
    restartPolicy: z.enum(["Always", "OnFailure", "Never"]).default("Always"),
    terminationGracePeriodSeconds: z.number().default(30),
    initContainers: z.array(Container).default([]),
    containers: z.array(Container),
    volumes: z.array(Volume).default([]),
    securityContext: Security,
    readinessGates: z.array(z.looseObject({ conditionType: z.string() })).default([]),
  }),
  status: z
    .looseObject({
      phase: z.string().default("Pending"),
      startTime: z.string().optional(),
      conditions: z.array(z.looseObject({ type: z.string(), status: z.string() })).default([]),
    })
    .default({ phase: "Pending", conditions: [] }),
});
export type Pod = z.infer<typeof Pod>;

export const podKey = (pod: Pod): string => `${pod.metadata.namespace}/${pod.metadata.name}`;

/** How many of an extended resource the pod holds: containers add up, init containers run one at a time. */
export function resourceOf(pod: Pod, resource: string): number {
  const of = (container: Container) => Number(container.resources.limits[resource] ?? 0);
  const main = pod.spec.containers.reduce((sum, container) => sum + of(container), 0);
  return Math.max(main, ...pod.spec.initContainers.map(of));
}

/** Who a container runs as: its own word, then the pod's; undefined where nobody says, which is root here. */
export function userOf(pod: Pod, container: Container): { user: number; group: number } | undefined {
  const user = container.securityContext?.runAsUser ?? pod.spec.securityContext?.runAsUser;
  if (user === undefined) return undefined;
  return { user, group: container.securityContext?.runAsGroup ?? pod.spec.securityContext?.runAsGroup ?? 0 };
}

/** A port by number or by the name that a container gave it. */
export function portOf(container: Container, port: number | string): number {
  if (typeof port === "number") return port;
  const named = container.ports.find(({ name }) => name === port)?.containerPort;
  return named ?? Number(port);
}
