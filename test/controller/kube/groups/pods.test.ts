// Objects of a group as golden YAML, and what no wish may reach.
// Regenerate: UPDATE_GOLDEN=1 npx vitest run test/controller/kube/pods.test.ts
import { readFileSync, writeFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { stringify } from "yaml";
import type { PodPatch } from "../../../../controller/api/pod-patch.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { fieldsOf, listOf } from "../../../../controller/kube/api/fields.ts";
import { readPatch } from "../../../../controller/kube/api/patch-reading.ts";
import {
  GANG_GATE,
  gangPod,
  parseSeats,
  type Reservation,
  seatsText,
} from "../../../../controller/kube/gangs/gang-pods.ts";
import { disruptionBudget, headlessService, podGroup } from "../../../../controller/kube/groups/group-objects.ts";
import { devicesOf, openingOf, type PodWishes, podName, workerPod } from "../../../../controller/kube/groups/pods.ts";
import { jsonPatch } from "../../../sim/patches.ts";
import { identity, planOf, replicaGroup, TEMPLATE } from "./groups.ts";

const isUpdating = process.env.UPDATE_GOLDEN === "1";

function patchOf(value: unknown): PodPatch {
  const read = readPatch(value);
  if (read.kind === "refused") throw new Error(JSON.stringify(read.faults));
  return read.patch;
}

const FULL = patchOf({
  labels: { team: "red" },
  annotations: { "example.com/note": "night" },
  queueLabels: { "kueue.x-k8s.io/queue-name": "gpus" },
  env: [{ name: "NCCL_DEBUG", value: "WARN" }],
  resources: { requests: { cpu: "32", "rdma/hca": 8 }, limits: { "rdma/hca": 8 } },
  tolerations: [{ key: "team", value: "red", effect: "NoSchedule" }],
  priorityClassName: "serving",
  imagePullSecrets: [{ name: "registry" }],
  hostCache: { path: "/var/cache/muster/fast" },
  ipcLock: true,
});
const GPU: PodWishes["gpu"] = {
  product: "H200",
  nodeSelector: { pool: "a" },
  tolerations: [{ key: "pool", operator: "Exists" }],
};
const who = identity();
const reservation: Reservation = {
  group: "models/chat-0",
  incarnation: 3n,
  sinceMs: Date.parse("2026-11-25T12:00:00.123Z"),
  seats: [
    { worker: 0, node: "gpu-4", devices: 8 },
    { worker: 1, node: "gpu-7", devices: 8 },
  ],
};

function opened(pod: KubeObject, seats = reservation): KubeObject {
  const seen: KubeObject = { ...pod, metadata: { ...pod.metadata, resourceVersion: "7" } };
  const patched = jsonPatch(seen, openingOf(seen, 1, seats));
  if (typeof patched !== "object" || patched === null) throw new Error("no pod");
  return { ...seen, ...patched };
}

const OBJECTS: Record<string, () => KubeObject> = {
  "worker-plain": () => workerPod(who, TEMPLATE),
  "worker-full": () => workerPod(who, TEMPLATE, { gpu: GPU, patch: FULL, hasPodGroup: true }),
  "worker-of-signer": () =>
    workerPod(who, { ...TEMPLATE, signer: "muster.dev/muster-system" }, { hasPodCertificate: true }),
  "worker-of-claim": () =>
    workerPod(who, TEMPLATE, {
      patch: patchOf({ env: [{ name: "MY_TOKEN", value: "x" }] }),
      source: { url: "pvc://weights/llama", secret: { name: "hub", key: "token" } },
    }),
  "worker-opened": () => opened(workerPod(who, TEMPLATE, { gpu: GPU })),
  "worker-of-draft-pool": () =>
    workerPod(identity({ owner: { kind: "DraftPool", name: "small" }, plan: planOf(1, 1), worker: 0 }), {
      ...TEMPLATE,
      caConfigMap: undefined,
    }),
  service: () => headlessService(who, TEMPLATE.port),
  "disruption-budget": () => disruptionBudget(who, 2),
  "pod-group": () => podGroup(who, 3n, { workers: 2, priorityClassName: "serving" }),
};

test.each(Object.keys(OBJECTS))("%s is built as reviewed", (name) => {
  const text = stringify(OBJECTS[name]?.(), { lineWidth: 0, aliasDuplicateObjects: false });
  const file = new URL(`golden/${name}.yaml`, import.meta.url);
  if (isUpdating) writeFileSync(file, text);
  expect(text).toBe(readFileSync(file, "utf8"));
});

describe("names and seats", () => {
  test("O1: incarnation and worker are in the name, which is a host name", () => {
    expect(podName(who)).toBe("chat-0-3-1");
    const names = new Set(
      [1n, 2n, 11n].flatMap((incarnation) => [0, 1, 11].map((worker) => podName(identity({ incarnation, worker })))),
    );
    expect(names.size).toBe(9);
    expect(() => podName(identity({ group: replicaGroup("g".repeat(60)) }))).toThrow(/63 characters/);
  });

  test("a worker drains no longer than its command takes, and its pod has the grace for it", () => {
    const spec = fieldsOf(workerPod(who, { ...TEMPLATE, drainSeconds: 100_000 }).spec);
    expect(spec.terminationGracePeriodSeconds).toBe(86_410);
    expect(listOf(fieldsOf(listOf(spec.containers)[0]).args).slice(-2)).toEqual(["--drain-seconds", "86400"]);
  });

  test("a worker asks for the GPUs of its own ranks", () => {
    expect(devicesOf(planOf(2, 8))).toEqual([8, 8]);
    const uneven = planOf(2, 2);
    expect(devicesOf({ ...uneven, ranks: uneven.ranks.slice(0, 3) })).toEqual([2, 1]);
  });

  test("what is built is read back as a gang's pod: closed, then with its seat", () => {
    const pod = workerPod(who, TEMPLATE);
    const closed = {
      name: "chat-0-3-1",
      group: "models/chat-0",
      incarnation: 3n,
      worker: 1,
      devices: 8,
      foreignGates: [],
    };
    expect(gangPod(pod)).toMatchObject({ ...closed, state: "waiting", written: undefined });
    expect(gangPod(opened(pod))).toMatchObject({
      ...closed,
      state: "released",
      written: { seats: reservation.seats, sinceMs: reservation.sinceMs },
    });
  });

  test("seats survive being written; text that is none reserves nothing", () => {
    const names = fc.stringMatching(/^[a-z0-9][-a-z0-9.]{0,20}$/);
    fc.assert(
      fc.property(
        fc.array(fc.tuple(names, fc.integer({ min: 0, max: 16 })), { minLength: 1, maxLength: 70 }),
        (list) => {
          const seats = list.map(([node, devices], worker) => ({ worker, node, devices }));
          expect(parseSeats(seatsText(seats))).toEqual(seats);
          expect(parseSeats(seatsText(seats.toReversed()))).toEqual(seats);
        },
      ),
    );
    for (const text of ["", "a", "a=", "a=x", "a=1,", "A=1", "a=-1", undefined])
      expect(parseSeats(text)).toBeUndefined();
  });
});

describe("the opening patch", () => {
  const term = (object: KubeObject) =>
    listOf(
      fieldsOf(
        fieldsOf(fieldsOf(fieldsOf(object.spec).affinity).nodeAffinity).requiredDuringSchedulingIgnoredDuringExecution,
      ).nodeSelectorTerms,
    );
  const seat = { key: "metadata.name", operator: "In", values: ["gpu-7"] };
  const withSpec = (more: object): KubeObject => {
    const pod = workerPod(who, TEMPLATE);
    return { ...pod, spec: { ...fieldsOf(pod.spec), ...more } };
  };

  test("gates of others stay closed, ours goes wherever it stands", () => {
    const gates = [{ name: "kueue.x-k8s.io/admission" }, { name: GANG_GATE }, { name: "other" }];
    expect(fieldsOf(opened(withSpec({ schedulingGates: gates })).spec).schedulingGates).toEqual([gates[0], gates[2]]);
  });

  test("affinity of others is kept and narrowed in every term", () => {
    const zone = { key: "zone", operator: "In", values: ["z1"] };
    const required = {
      nodeSelectorTerms: [{ matchExpressions: [zone] }, { matchFields: [{ ...seat, values: ["gpu-7", "gpu-8"] }] }],
    };
    const narrowed = opened(
      withSpec({ affinity: { nodeAffinity: { requiredDuringSchedulingIgnoredDuringExecution: required } } }),
    );
    expect(term(narrowed)).toEqual([
      { matchExpressions: [zone], matchFields: [seat] },
      { matchFields: [{ ...seat, values: ["gpu-7", "gpu-8"] }, seat] },
    ]);
    expect(term(opened(withSpec({ affinity: { podAffinity: {} } })))).toEqual([{ matchFields: [seat] }]);
    expect(term(opened(withSpec({ affinity: { nodeAffinity: {} } })))).toEqual([{ matchFields: [seat] }]);
    const preferred = { preferredDuringSchedulingIgnoredDuringExecution: [] };
    expect(term(opened(withSpec({ affinity: { nodeAffinity: preferred } })))).toEqual([{ matchFields: [seat] }]);
  });

  test("annotations of others stay", () => {
    const pod = workerPod(who, TEMPLATE, { patch: FULL });
    expect(opened(pod).metadata.annotations).toEqual({
      "example.com/note": "night",
      "muster.dev/seats": "gpu-4=8,gpu-7=8",
      "muster.dev/reserved-at": "2026-11-25T12:00:00.123Z",
    });
  });

  test("an open pod, or a worker without a seat, is a broken call", () => {
    expect(() => openingOf(opened(workerPod(who, TEMPLATE)), 1, reservation)).toThrow(/no gate/);
    expect(() => openingOf(workerPod(who, TEMPLATE), 5, reservation)).toThrow(/no seat/);
  });
});

describe("what a patch may not", () => {
  const refusedFields = (value: unknown): string[] => {
    const read = readPatch(value);
    return read.kind === "refused" ? read.faults.map(({ field }) => field) : [];
  };

  test("every refused key is named", () => {
    expect(refusedFields({ serviceAccountName: "root", volumes: [], hostNetwork: true })).toEqual([
      "podPatch.serviceAccountName",
      "podPatch.volumes",
      "podPatch.hostNetwork",
    ]);
    expect(refusedFields({ env: [{ name: "A", valueFrom: { secretKeyRef: { name: "s", key: "k" } } }] })).toContain(
      "podPatch.env.0.valueFrom",
    );
    const read = readPatch({ securityContext: {} });
    expect(read.kind === "refused" && read.faults[0]?.detail).toMatch(
      /^remove it: podPatch takes labels, annotations, /,
    );
  });

  test("keys of ours, GPUs, reserved variables and foreign paths are refused", () => {
    expect(refusedFields({ labels: { "muster.dev/group": "x" } })).toEqual(["podPatch.labels"]);
    expect(refusedFields({ annotations: { "muster.dev/seats": "x=8" } })).toEqual(["podPatch.annotations"]);
    expect(refusedFields({ resources: { limits: { "nvidia.com/gpu": 1 } } })).toEqual(["podPatch.resources.limits"]);
    expect(refusedFields({ env: [{ name: "LD_PRELOAD", value: "x" }] })).toEqual(["podPatch.env.0.name"]);
    expect(refusedFields({ env: [{ name: "MUSTER_POD_IP", value: "x" }] })).toEqual(["podPatch.env.0.name"]);
    expect(refusedFields({ hostCache: { path: "/etc" } })).toEqual(["podPatch.hostCache.path"]);
    expect(refusedFields({ hostCache: { path: "/var/cache/muster/../../.." } })).toEqual(["podPatch.hostCache.path"]);
  });

  // Keys a person may try, right and wrong, with any values.
  const keys = fc.constantFrom(
    ...[
      "labels",
      "annotations",
      "env",
      "resources",
      "tolerations",
      "priorityClassName",
      "imagePullSecrets",
      "hostCache",
    ],
    ...[
      "ipcLock",
      "queueLabels",
      "serviceAccountName",
      "serviceAccount",
      "volumes",
      "volumeMounts",
      "containers",
      "envFrom",
    ],
    ...[
      "securityContext",
      "hostNetwork",
      "hostPID",
      "nodeName",
      "schedulerName",
      "initContainers",
      "restartPolicy",
      "args",
    ],
  );
  const texts = fc.constantFrom(
    "x",
    "muster.dev/group",
    "nvidia.com/gpu",
    "8",
    "/etc",
    "secret",
    "muster.dev/seats",
    "kueue.x-k8s.io/q",
  );
  const values = fc.letrec((tie) => ({
    value: fc.oneof(
      { depthSize: "small", withCrossShrink: true },
      texts,
      fc.boolean(),
      fc.nat({ max: 9 }),
      fc.array(tie("value"), { maxLength: 2 }),
      fc.dictionary(
        fc.oneof(
          texts,
          fc.constantFrom("name", "value", "valueFrom", "secretKeyRef", "path", "limits", "requests", "key"),
        ),
        tie("value"),
        { maxKeys: 3 },
      ),
    ),
  })).value;
  const right = fc.record(
    {
      labels: fc.dictionary(
        fc.constantFrom("a", "app.kubernetes.io/name", "team"),
        texts.filter((text) => !text.includes("/")),
        { maxKeys: 2 },
      ),
      env: fc.uniqueArray(fc.record({ name: fc.constantFrom("A", "NCCL_DEBUG", "HTTP_PROXY"), value: texts }), {
        selector: ({ name }) => name,
        maxLength: 3,
      }),
      resources: fc.record({
        requests: fc.dictionary(fc.constantFrom("cpu", "memory", "rdma/hca"), fc.nat({ max: 99 })),
      }),
      imagePullSecrets: fc.array(fc.record({ name: fc.constantFrom("one", "two") }), { maxLength: 2 }),
      hostCache: fc.record({ path: fc.constantFrom("/var/cache/muster", "/var/cache/muster/x") }),
      ipcLock: fc.boolean(),
    },
    { requiredKeys: [] },
  );

  test("O2: whatever is written, it is refused or reaches nothing but the list", () => {
    const plain = fieldsOf(workerPod(who, TEMPLATE).spec);
    let taken = 0;
    fc.assert(
      fc.property(fc.oneof(fc.dictionary(keys, values, { maxKeys: 4 }), right), (value) => {
        const read = readPatch(value);
        if (read.kind === "refused") {
          expect(read.faults.length).toBeGreaterThan(0);
          for (const { field, detail } of read.faults)
            expect([field.startsWith("podPatch"), detail !== ""]).toEqual([true, true]);
          return;
        }
        taken++;
        const pod = workerPod(who, TEMPLATE, { patch: read.patch });
        const spec = fieldsOf(pod.spec);
        const loose = new Set(["tolerations", "priorityClassName", "imagePullSecrets", "containers", "volumes"]);
        for (const key of new Set([...Object.keys(plain), ...Object.keys(spec)])) {
          if (!loose.has(key)) expect(spec[key], key).toEqual(plain[key]);
        }
        expect(spec.serviceAccountName).toBe("muster-worker");
        const volumes = listOf(spec.volumes).map(fieldsOf);
        expect(volumes.map(({ name }) => name)).toEqual(["shm", "identity", "cache", "tmp"]);
        expect(volumes.every((volume) => volume.secret === undefined)).toBe(true);
        const paths = volumes.flatMap(({ hostPath }) =>
          hostPath === undefined ? [] : [String(fieldsOf(hostPath).path)],
        );
        expect(paths.every((path) => path.startsWith("/var/cache/muster") && !path.includes(".."))).toBe(true);
        const [worker] = listOf(spec.containers).map(fieldsOf);
        const given = listOf(fieldsOf(plain).containers).map(fieldsOf)[0];
        expect(listOf(spec.containers).length).toBe(1);
        for (const key of ["image", "command", "args", "ports", "volumeMounts"])
          if (key !== "volumeMounts" || read.patch.hostCache === undefined)
            expect(worker?.[key], key).toEqual(given?.[key]);
        const references = listOf(worker?.env)
          .map(fieldsOf)
          .flatMap(({ valueFrom }) => Object.keys(fieldsOf(valueFrom)));
        expect(references).toEqual(["fieldRef", "fieldRef", "fieldRef"]);
        for (const side of ["requests", "limits"])
          expect(fieldsOf(fieldsOf(worker?.resources)[side])["nvidia.com/gpu"]).toBe(8);
        expect(gangPod(pod)).toMatchObject({
          group: "models/chat-0",
          incarnation: 3n,
          worker: 1,
          devices: 8,
          state: "waiting",
          written: undefined,
        });
        expect(pod.metadata.labels?.["app.kubernetes.io/name"]).toBe("muster");
      }),
      { numRuns: 2000 },
    );
    expect(taken).toBeGreaterThan(500);
  });
});
