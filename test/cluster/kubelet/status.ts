// What the process kubelet says of a pod: pure, from what it knows of each container to the status that the API server keeps.
//
//   S1  a pod is Ready only when every container is (and every readiness gate of others says True).
//   S2  Succeeded and Failed are final: only for pods whose containers will not run again.
import type { Pod } from "./pod.ts";

export type Ended = {
  code: number;
  signal: number | undefined;
  reason: string;
  message: string;
  startedAt: string;
  finishedAt: string;
};
export type Phase =
  | { kind: "waiting"; reason: string; message: string }
  | { kind: "running"; startedAt: string; isStarted: boolean; isReady: boolean }
  | { kind: "ended"; how: Ended };
export type ContainerView = { name: string; image: string; phase: Phase; restarts: number; last: Ended | undefined };
export type PodView = {
  pod: Pod;
  ip: string | undefined;
  hostIp: string;
  startTime: string;
  now: string;
  init: readonly ContainerView[];
  main: readonly ContainerView[];
  /** No container will be started again. */
  isOver: boolean;
};

type Condition = { type: string; status: "True" | "False"; reason?: string; message?: string };
export type Dated = Condition & { lastTransitionTime: string };
export type PodStatus = { phase: string; conditions: Dated[] } & Record<string, unknown>;

/** `before` are the conditions said last: one that stays as it was keeps its time. */
export function podStatus(view: PodView, before: readonly Dated[]): PodStatus {
  const phase = phaseOf(view);
  return {
    phase,
    hostIP: view.hostIp,
    hostIPs: [{ ip: view.hostIp }],
    ...(view.ip ? { podIP: view.ip, podIPs: [{ ip: view.ip }] } : {}),
    startTime: view.startTime,
    conditions: conditionsOf(view, phase).map((condition) => {
      const same = before.find(({ type, status }) => type === condition.type && status === condition.status);
      return { ...condition, lastTransitionTime: same?.lastTransitionTime ?? view.now };
    }),
    initContainerStatuses: view.init.map(containerStatus),
    containerStatuses: view.main.map(containerStatus),
  };
}

export function phaseOf({ isOver, init, main }: PodView): "Pending" | "Running" | "Succeeded" | "Failed" {
  if (isOver) return [...init, ...main].every(isSuccess) ? "Succeeded" : "Failed";
  return main.every(({ phase, restarts }) => phase.kind === "waiting" && restarts === 0) ? "Pending" : "Running";
}

const isSuccess = ({ phase }: ContainerView) => phase.kind === "ended" && phase.how.code === 0;
const isReady = ({ phase }: ContainerView) => phase.kind === "running" && phase.isReady;

function conditionsOf(view: PodView, phase: string): Condition[] {
  const over = phase === "Succeeded" || phase === "Failed";
  const unready = view.main.filter((container) => !isReady(container)).map(({ name }) => name);
  const why =
    phase === "Succeeded"
      ? { reason: "PodCompleted" }
      : phase === "Failed"
        ? { reason: "PodFailed" }
        : { reason: "ContainersNotReady", message: `containers with unready status: [${unready.join(" ")}]` };
  const isWhole = !over && unready.length === 0;
  const gates = view.pod.spec.readinessGates.every(({ conditionType }) =>
    view.pod.status.conditions.some(({ type, status }) => type === conditionType && status === "True"),
  );
  const initialized = view.init.every(isSuccess);
  return [
    { type: "PodReadyToStartContainers", status: view.ip && !over ? "True" : "False" },
    { type: "Initialized", status: initialized ? "True" : "False" },
    { type: "ContainersReady", status: isWhole ? "True" : "False", ...(isWhole ? {} : why) },
    {
      type: "Ready",
      status: isWhole && gates ? "True" : "False",
      ...(isWhole ? (gates ? {} : { reason: "ReadinessGatesNotReady" }) : why),
    },
  ];
}

function containerStatus({ name, image, phase, restarts, last }: ContainerView): Record<string, unknown> {
  return {
    name,
    image,
    imageID: `process://${image}`,
    restartCount: restarts,
    ready: phase.kind === "running" ? phase.isReady : false,
    started: phase.kind === "running" && phase.isStarted,
    state: stateOf(phase),
    lastState: last ? { terminated: terminated(last) } : {},
  };
}

function stateOf(phase: Phase): Record<string, unknown> {
  switch (phase.kind) {
    case "waiting":
      return { waiting: { reason: phase.reason, message: phase.message } };
    case "running":
      return { running: { startedAt: phase.startedAt } };
    case "ended":
      return { terminated: terminated(phase.how) };
  }
}

function terminated(how: Ended): Record<string, unknown> {
  return {
    exitCode: how.code,
    ...(how.signal ? { signal: how.signal } : {}),
    reason: how.reason,
    message: how.message,
    startedAt: how.startedAt,
    finishedAt: how.finishedAt,
  };
}
