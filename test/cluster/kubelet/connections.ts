// Which pods have talked to whom: the TCP connections between pods' networks, as the kernel's tables show them. Needs pods with
// networks of their own (Bed.start with podNetworks): only then does an address say who it is.
//
//   C1  a connection that lasts, or that a pod has closed in an orderly way, is seen: it stands in a table for 60 s after it
//       (TIME_WAIT). One that was reset within POLL_MS may be missed, one that was refused never was one.
//   C2  who began it: not the side whose port is, or was, listened on: what a server leaves behind is still its callers'.
//   C3  through a Service's address it is told once, from the caller to the endpoint, with the address in `via`.
//   C4  an address is a pod's beyond its end, until another pod has it: others still have connections to it in their tables.
import { readFileSync } from "node:fs";
import { SERVICE_NETWORK } from "../controlplane/network-space.ts";
import { pause } from "./probe.ts";

export type PodName = { namespace: string; name: string; labels: Readonly<Record<string, string>> };
/** Without a pod it is the space: the API server, probes of the kubelet, the test itself. */
export type End = { ip: string; pod: PodName | undefined };
export type Connection = { from: End; to: End & { port: number }; via: string | undefined };

/** A pod's network as it is watched. `pid`: a process in it. */
export type Watched = PodName & { ip: string; pid: number };
type Socket = { local: string; localPort: number; remote: string; remotePort: number; isListening: boolean };

const POLL_MS = 250;
const LISTEN = "0A";
/** Not begun (SYN_SENT) or not known yet (SYN_RECV). */
const UNBORN = ["02", "03"];

export class Connections {
  readonly #seen = new Map<string, Connection>();
  /** By address; C4. */
  readonly #pods = new Map<string, PodName>();
  /** Ports by the process that holds the network; C2. */
  readonly #listened = new Map<number, Set<number>>();
  readonly #watched: () => readonly Watched[];
  readonly #stop = new AbortController();

  constructor(watched: () => readonly Watched[]) {
    this.#watched = watched;
    void this.#poll();
  }

  /** All that were seen so far, the current look included; each once. */
  all(): Connection[] {
    this.#look();
    return [...this.#seen.values()];
  }

  stop(): void {
    this.#stop.abort();
  }

  /** A line of the Services' proxy: `CALLER SERVICE:PORT ENDPOINT:PORT`. */
  joined(line: string): void {
    const [from = "", via = "", target = ""] = line.split(" ");
    const [ip = "", port = ""] = target.split(":");
    if (ip === "" || !via.includes(":")) return;
    this.#learn(this.#watched());
    this.#add({ from: this.#end(from), to: { ...this.#end(ip), port: Number(port) }, via });
  }

  async #poll(): Promise<void> {
    const { signal } = this.#stop;
    while (!signal.aborted) {
      this.#look();
      await pause(POLL_MS, signal);
    }
  }

  #look(): void {
    const watched = this.#watched();
    this.#learn(watched);
    for (const { pid, ip: own } of watched) {
      const sockets = socketsOf(pid);
      const listened = this.#listened.get(pid) ?? new Set();
      this.#listened.set(pid, listened);
      for (const { isListening, localPort } of sockets) if (isListening) listened.add(localPort);
      for (const { local, localPort, remote, remotePort, isListening } of sockets) {
        if (isListening || local !== own || remote === own) continue;
        const isServer = listened.has(localPort);
        // A caller of a Service is told by the proxy, with the endpoint (C3).
        if (!isServer && isService(remote)) continue;
        const [from, to, port] = isServer ? [remote, local, localPort] : [local, remote, remotePort];
        this.#add({ from: this.#end(from), to: { ...this.#end(to), port }, via: undefined });
      }
    }
  }

  #learn(watched: readonly Watched[]): void {
    for (const { ip, namespace, name, labels } of watched) this.#pods.set(ip, { namespace, name, labels });
  }

  #end(ip: string): End {
    return { ip, pod: this.#pods.get(ip) };
  }

  #add(connection: Connection): void {
    const { from, to, via = "" } = connection;
    const key = `${nameOf(from)} ${nameOf(to)}:${to.port} ${via}`;
    if (!this.#seen.has(key)) this.#seen.set(key, connection);
  }
}

const nameOf = ({ ip, pod }: End): string => (pod === undefined ? ip : `${ip} ${pod.namespace}/${pod.name}`);
const SERVICES = SERVICE_NETWORK.replace(/\d+\/24$/, "");
const isService = (ip: string): boolean => ip.startsWith(SERVICES);

function socketsOf(pid: number): Socket[] {
  return ["tcp", "tcp6"].flatMap((table) => parseSockets(tableOf(`/proc/${pid}/net/${table}`)));
}

function tableOf(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return ""; // the pod has just ended
  }
}

/** Lines of /proc/net/tcp or tcp6; IPv6 addresses other than mapped IPv4 ones are left out. */
export function parseSockets(table: string): Socket[] {
  return table.split("\n").flatMap((line): Socket[] => {
    const [, local = "", remote = "", state = ""] = line.trim().split(/\s+/);
    const here = endOf(local);
    const there = endOf(remote);
    if (here === undefined || there === undefined || UNBORN.includes(state)) return [];
    const isListening = state === LISTEN;
    return [{ local: here.ip, localPort: here.port, remote: there.ip, remotePort: there.port, isListening }];
  });
}

/** `0201F40A:1F90` is 10.244.1.2:8080: each word of four bytes is in the machine's (little-endian) order. */
function endOf(text: string): { ip: string; port: number } | undefined {
  const match = /^(?:0{16}(?:FFFF0000|0{8}))?([0-9A-F]{8}):([0-9A-F]{4})$/.exec(text);
  if (match?.[1] === undefined || match[2] === undefined) return undefined;
  const bytes = match[1].match(/../g)?.map((byte) => Number.parseInt(byte, 16)) ?? [];
  return { ip: bytes.toReversed().join("."), port: Number.parseInt(match[2], 16) };
}
