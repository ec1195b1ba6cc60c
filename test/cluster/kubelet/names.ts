// Names of Services and of pods behind headless Services, as hosts files: one for each namespace, kept from Services and
// EndpointSlices. Stands in for cluster DNS: a Service's name is its cluster address (service-proxy.ts answers there), a
// headless one's name the addresses of its ready endpoints.
//
//   H1  a hosts file is rewritten in place: it is bound into running containers, which see the new names at once.
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import type { RawApi, Thing } from "../controlplane/raw-api.ts";
import { pause } from "./probe.ts";

const RETRY_MS = 500;
const SERVICE_LABEL = "kubernetes.io/service-name";
const Slice = z.looseObject({
  endpoints: z
    .array(
      z.looseObject({
        addresses: z.array(z.string()),
        hostname: z.string().optional(),
        conditions: z.looseObject({ ready: z.boolean().optional() }).default({}),
      }),
    )
    .nullish(),
});

const Service = z.looseObject({ spec: z.looseObject({ clusterIP: z.string().default("") }) });

export class Names {
  readonly #folder: string;
  readonly #services = new Map<string, Thing>();
  readonly #slices = new Map<string, Thing>();
  readonly #files = new Set<string>();
  readonly #stop = new AbortController();

  constructor(folder: string) {
    this.#folder = folder;
    mkdirSync(folder, { recursive: true });
  }

  /** Follows Services and slices until `stop`. */
  async follow(api: RawApi): Promise<void> {
    await Promise.all([
      this.#keep(api, "/api/v1/services", this.#services),
      this.#keep(api, "/apis/discovery.k8s.io/v1/endpointslices", this.#slices),
    ]);
  }

  stop(): void {
    this.#stop.abort();
  }

  /** Path of the hosts file of a namespace; it exists from now on. */
  file(namespace: string): string {
    const path = join(this.#folder, namespace);
    if (!this.#files.has(namespace)) {
      this.#files.add(namespace);
      this.#write();
    }
    return path;
  }

  async #keep(api: RawApi, path: string, things: Map<string, Thing>): Promise<void> {
    const { signal } = this.#stop;
    const hear = {
      whole: (all: Thing[]) => {
        things.clear();
        for (const thing of all) things.set(thing.metadata.uid, thing);
        this.#write();
      },
      changed: (type: string, thing: Thing) => {
        if (type === "DELETED") things.delete(thing.metadata.uid);
        else things.set(thing.metadata.uid, thing);
        this.#write();
      },
    };
    while (!signal.aborted) {
      await api.follow(path, hear, signal).catch(() => undefined); // the API server is away: the names stay as they were
      await pause(RETRY_MS, signal);
    }
  }

  #write(): void {
    if (this.#stop.signal.aborted) return;
    for (const namespace of this.#files) {
      const text = hostsFile(namespace, [...this.#services.values()], [...this.#slices.values()]);
      writeFileSync(join(this.#folder, namespace), text);
    }
  }
}

/** Lines for every name that a pod of `namespace` can write: bare names for its own namespace, dotted ones for all. */
export function hostsFile(namespace: string, services: readonly Thing[], slices: readonly Thing[]): string {
  const lines = ["127.0.0.1 localhost"];
  const namesOf = (service: string, home: string) => {
    const zone = `${service}.${home}`;
    const full = [`${zone}.svc.cluster.local`, `${zone}.svc`, zone];
    return home === namespace ? [...full, service] : full;
  };
  const headless = new Set<string>();
  for (const service of services) {
    const { clusterIP } = Service.parse(service).spec;
    const { name, namespace: home } = service.metadata;
    if (clusterIP === "None") headless.add(`${home}/${name}`);
    else if (clusterIP !== "") lines.push(`${clusterIP} ${namesOf(name, home).join(" ")}`);
  }
  for (const slice of slices) {
    const service = slice.metadata.labels[SERVICE_LABEL];
    const home = slice.metadata.namespace;
    if (!service || !headless.has(`${home}/${service}`)) continue;
    const names = namesOf(service, home);
    for (const { addresses, hostname, conditions } of Slice.parse(slice).endpoints ?? []) {
      if (conditions.ready === false) continue;
      for (const address of addresses) {
        lines.push(`${address} ${names.join(" ")}`);
        if (hostname) lines.push(`${address} ${names.map((name) => `${hostname}.${name}`).join(" ")}`);
      }
    }
  }
  return `${lines.join("\n")}\n`;
}

/** How a pod finds the API server: the first address of the Services' network. */
export const API_ENVIRONMENT = { KUBERNETES_SERVICE_HOST: "10.0.0.1", KUBERNETES_SERVICE_PORT: "443" };
