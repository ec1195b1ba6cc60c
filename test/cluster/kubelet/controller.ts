// `muster controller` beside a bed: its CRDs, the program as a process of its own inside the network space, and what it said.
// Owns the files it is started with (kubeconfig, worker template, log), all in the bed's folder; the process ends with the bed.
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parse } from "yaml";
import { API_PORT } from "../controlplane/start.ts";
import type { Bed } from "./bed.ts";

const ROOT = join(import.meta.dirname, "../../..");
const CRDS = join(ROOT, "charts/muster/templates/crds");
const KINDS = ["modeldeployments", "draftpools", "shardplans", "replicagroups"];
const SAID_CHARS_MAX = 4_000;
export const MAIN = join(ROOT, "controller/cli/main.ts");

/** Flags of `muster controller` without dashes; `true` for one without a value. */
export type Flags = Readonly<Record<string, string | true>>;
type Start = {
  /** Name of the process and its log; several controllers of one bed need several. Default "controller". */
  id?: string;
  env?: Readonly<Record<string, string>>;
};

/** Makes the chart's custom resource definitions; resolves when all of their kinds are served. */
export async function installCrds({ plane }: Pick<Bed, "plane">): Promise<void> {
  for (const file of readdirSync(CRDS)) {
    const body = parse(readFileSync(join(CRDS, file), "utf8"));
    await plane.api.ask({ method: "POST", path: "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body });
  }
  for (const kind of KINDS) await plane.serves(`/apis/muster.dev/v1alpha1/namespaces/default/${kind}`);
}

/** Starts a controller inside the space, where pods are reached by their addresses; `flags` add to and replace the defaults. */
export function startController(bed: Bed, flags: Flags = {}, { id = "controller", env = {} }: Start = {}): void {
  const { plane } = bed;
  const defaults = {
    kubeconfig: insideKubeconfig(bed),
    "worker-image": "muster/worker:test",
    "lease-namespace": "default",
  };
  const template = flags["worker-template"] ?? workerTemplate(bed);
  const all: Flags = { ...defaults, ...flags, "worker-template": template };
  const args = Object.entries(all).flatMap(([flag, value]) => [`--${flag}`, ...(value === true ? [] : [value])]);
  plane.processes.spawn({
    id,
    ...plane.space.inside(process.execPath, [MAIN, "controller", ...args]),
    env: { PATH: process.env.PATH ?? "", HOME: process.env.HOME ?? "/", ...env },
    log: logOf(bed, id),
    watchesStdin: false,
  });
}

/** Starts a gateway inside the space, where leaders are reached by their addresses; `http`: where it listens. */
export function startGateway(bed: Bed, http: string, more: readonly string[] = []): void {
  const { plane } = bed;
  const listen = ["--http", http, "--grpc", "127.0.0.1:8081"];
  const args = ["gateway", "--kubernetes", "--kubeconfig", insideKubeconfig(bed), ...listen, ...more];
  plane.processes.spawn({
    id: "gateway",
    ...plane.space.inside(process.execPath, [MAIN, ...args]),
    env: { PATH: process.env.PATH ?? "", HOME: process.env.HOME ?? "/" },
    log: logOf(bed, "gateway"),
    watchesStdin: false,
  });
}

/** The end of what a controller wrote; empty where none was started under `id`. */
export function controllerSaid(bed: Bed, id = "controller"): string {
  return existsSync(logOf(bed, id)) ? readFileSync(logOf(bed, id), "utf8").slice(-SAID_CHARS_MAX) : "";
}

/** Path of a kubeconfig of the admin that is right inside the space. */
export function insideKubeconfig({ plane }: Bed): string {
  const path = join(plane.dir, "inside.kubeconfig");
  const own = readFileSync(plane.kubeconfig, "utf8").replaceAll(plane.url, `https://127.0.0.1:${API_PORT}`);
  writeFileSync(path, own, { mode: 0o600 });
  return path;
}

/** Path of a worker template that starts this checkout's workers; `fields` add to and replace the defaults. */
export function workerTemplate({ plane }: Bed, fields: Readonly<Record<string, unknown>> = {}): string {
  const path = join(plane.dir, "worker-template.json");
  const addon = process.env.MUSTER_ADDON === undefined ? [] : ["env", `MUSTER_ADDON=${process.env.MUSTER_ADDON}`];
  const command = [...addon, process.execPath, MAIN];
  // All pods of the bed are in one network space: nobody may listen on all of its addresses.
  const listenHost = "$(MUSTER_POD_IP)";
  const defaults = { command, listenHost, serviceAccountName: "default", drainSeconds: 5 };
  writeFileSync(path, JSON.stringify({ ...defaults, ...fields }));
  return path;
}

const logOf = ({ plane }: Bed, id: string) => join(plane.dir, `${id}.log`);
