// Where the leader is found: EndpointSlice `muster-leader` behind the headless Service of that name, written by whoever leads
// with its own address. Owns that one object.
//
//   L1  from the beginning of a term on it names this process alone, and what anybody else writes there is put right.
//   L2  at the end of a term it stays as it is: the next leader writes its own, and an old one is no worse than none.

import { isIPv6 } from "node:net";
import { isDeepStrictEqual } from "node:util";
import { applyOwned, ownerReferenceTo } from "../api/apply.ts";
import { isAlreadyThere, isRefused, type KubeApi, KubeError, type KubeObject } from "../api/client.ts";
import type { Clock } from "../api/clock.ts";
import { fieldsOf, listOf } from "../api/fields.ts";
import { backoffMs } from "../api/rate-limit.ts";
import { endpointSlices, services } from "../api/resources.ts";
import { Reflector } from "../watch/reflector.ts";
import { Store } from "../watch/store.ts";
import type { Term } from "./lease.ts";

export const LEADER_SERVICE = "muster-leader";
const SERVICE_LABEL = "kubernetes.io/service-name";
const MANAGER_LABEL = "endpointslice.kubernetes.io/managed-by";
const MANAGER = "controller.muster.dev";
const BACKOFF = { baseMs: 250, maxMs: 15_000 };

export type LeaderPort = { name: string; port: number };

export type LeaderEndpointOptions = {
  clock: Clock;
  random: () => number;
  /** Of the release. */
  namespace: string;
  /** IP of this process's pod. */
  address: string;
  /** Named as in the Service. */
  ports: readonly LeaderPort[];
  onTrouble?: (detail: string) => void;
};

/** A Part of run-controller.ts. */
export function leaderEndpointPart(
  options: LeaderEndpointOptions,
): (lead: { api: KubeApi; term: Pick<Term, "signal"> }) => Promise<void> {
  return async ({ api, term: { signal } }) => {
    const { clock, random, namespace, onTrouble } = options;
    const store = new Store();
    const selection = { namespace, fieldSelector: `metadata.name=${LEADER_SERVICE}` };
    const reflector = new Reflector({ api, resource: endpointSlices, store, clock, random, ...selection });
    let changed = new AbortController();
    const unsubscribe = store.subscribe(() => changed.abort());
    const reflected = reflector.run(signal);
    try {
      // Not after the first list: where lists fail a write may still go through.
      for (let failures = 0; !signal.aborted; ) {
        changed = new AbortController();
        let againMs = Number.POSITIVE_INFINITY;
        try {
          const seen = store.get(`${namespace}/${LEADER_SERVICE}`);
          if (seen === undefined || !isRight(seen, options)) store.learn(await write(api, seen, options, signal));
          failures = 0;
        } catch (error) {
          if (signal.aborted) break;
          if (!(error instanceof KubeError)) throw error;
          failures += 1;
          againMs = clock.nowMs() + backoffMs(failures, BACKOFF, random);
          onTrouble?.(`the leader cannot be told of: ${error.message}`);
        }
        await clock.sleep(AbortSignal.any([signal, changed.signal]), againMs);
      }
    } finally {
      unsubscribe();
      await reflected;
    }
  };
}

/** As it is to be. `service`: goes with it when the release is uninstalled. */
export function leaderSlice(
  { namespace, address, ports }: Pick<LeaderEndpointOptions, "namespace" | "address" | "ports">,
  service: KubeObject | undefined,
): KubeObject {
  return {
    apiVersion: "discovery.k8s.io/v1",
    kind: "EndpointSlice",
    metadata: {
      name: LEADER_SERVICE,
      namespace,
      labels: { [SERVICE_LABEL]: LEADER_SERVICE, [MANAGER_LABEL]: MANAGER, "app.kubernetes.io/managed-by": "muster" },
      ...(service === undefined ? {} : { ownerReferences: [ownerReferenceTo(service, false)] }),
    },
    addressType: typeOf(address),
    endpoints: [{ addresses: [address], conditions: { ready: true, serving: true, terminating: false } }],
    ports: ports.map(({ name, port }) => ({ name, port, protocol: "TCP" })),
  };
}

const typeOf = (address: string): "IPv4" | "IPv6" => (isIPv6(address) ? "IPv6" : "IPv4");

async function write(
  api: KubeApi,
  seen: KubeObject | undefined,
  options: LeaderEndpointOptions,
  signal: AbortSignal,
): Promise<KubeObject> {
  const { namespace } = options;
  const { resourceVersion } = seen?.metadata ?? {};
  // The type of addresses cannot be changed.
  if (seen !== undefined && resourceVersion !== undefined && seen.addressType !== typeOf(options.address))
    await api.delete(endpointSlices, LEADER_SERVICE, namespace, { preconditions: { resourceVersion } }, signal);
  const service = await api.get(services, LEADER_SERVICE, namespace, signal).catch((error: unknown) => {
    if (isRefused(error)) return undefined; // it is told of all the same, and stays behind at an uninstall
    throw error;
  });
  const slice = leaderSlice(options, service);
  try {
    return await applyOwned(api, endpointSlices, slice, { signal });
  } catch (error) {
    if (!isAlreadyThere(error)) throw error;
    return await applyOwned(api, endpointSlices, slice, { signal }); // two applies that both created: the second is a change
  }
}

/** Whether it says what we would write; fields that others add are theirs. */
function isRight(seen: KubeObject, options: LeaderEndpointOptions): boolean {
  const wanted = leaderSlice(options, undefined);
  const isLabelled = Object.entries(wanted.metadata.labels ?? {}).every(
    ([label, value]) => seen.metadata.labels?.[label] === value,
  );
  const endpoints = listOf(seen.endpoints).map(fieldsOf);
  const [endpoint] = endpoints;
  return (
    isLabelled &&
    seen.addressType === wanted.addressType &&
    endpoints.length === 1 &&
    isDeepStrictEqual(endpoint?.addresses, [options.address]) &&
    fieldsOf(endpoint?.conditions).ready === true &&
    isDeepStrictEqual(sorted(seen.ports), sorted(wanted.ports))
  );
}

const sorted = (ports: unknown): string[] =>
  listOf(ports)
    .map(fieldsOf)
    .map(({ name, port, protocol }) => `${name} ${port} ${protocol}`)
    .sort();
