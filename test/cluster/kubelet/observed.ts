// What a bed has observed between pods, as connections that NetworkPolicies are asked about, and the edges between components
// that it shows. What is no pod and has an address of the bed itself is its node: the kubelet's probes, the test's own requests
// and the second half of a connection through a Service, whose whole is told with the caller.
import type { Connection as Asked, End as AskedEnd } from "../../charts/policies.ts";
import { SPACE_ADDRESS } from "../controlplane/network-space.ts";
import type { Connection, End } from "./connections.ts";

const COMPONENT = "app.kubernetes.io/component";

export function askedOf(connections: readonly Connection[]): Asked[] {
  return connections.map(({ from, to }) => ({ from: endOf(from), to: endOf(to), port: to.port }));
}

function endOf({ ip, pod }: End): AskedEnd {
  if (pod !== undefined) return { kind: "pod", ...pod, ip };
  return ip === SPACE_ADDRESS ? { kind: "node", name: "bed", ip } : { kind: "address", ip };
}

/** `gateway -> worker:7440`, each once; ports of collectives are drawn, so between workers any but `fixed` is `*`. */
export function edgesOf(connections: readonly Connection[], fixed: readonly number[]): string[] {
  const name = ({ ip, pod }: End): string => pod?.labels[COMPONENT] ?? pod?.name ?? ip;
  const edges = connections.map(({ from, to, via }) => {
    const port = fixed.includes(to.port) ? to.port : "*";
    return `${name(from)} -> ${name(to)}:${port}${via === undefined ? "" : " by its Service"}`;
  });
  return [...new Set(edges)].toSorted();
}
