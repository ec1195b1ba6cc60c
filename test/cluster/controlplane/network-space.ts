// A network namespace for one test cluster: control plane and pods live in it, addresses of pods are local there and nowhere
// else on the machine. Owns the namespace (held by the door process) and the ways in: dial, http, forward.
//
//   N1  inside, 127.0.0.0/8, POD_NETWORK and SERVICE_NETWORK are local; there is no other route, so nothing in it can reach another machine.
//       With pod networks only OWN_NETWORK of the pods' is: the others are routed to their pods (kubelet/pod-network.ts).
//   N2  outside, only loopback ports of forwards listen, and only while this process lives.
import { once } from "node:events";
import { request } from "node:http";
import { connect, createServer, type Server, type Socket } from "node:net";
import { join } from "node:path";
import type { Guarded } from "../../../controller/local/guarded.ts";

export const POD_NETWORK = "10.244.0.0/16"; // loopback addresses are refused in EndpointSlices
export const SERVICE_NETWORK = "10.0.0.0/24"; // its first address is the API server's
/** Where pods have networks of their own, the space is this one to them; processes beside it may take others of OWN_NETWORK. */
export const SPACE_ADDRESS = "10.244.0.1";
const OWN_NETWORK = "10.244.0.0/24";
/** Next hop of every pod: it is nobody's address but answered for on each device. */
export const GATEWAY = "169.254.1.1";
const OPEN_TIMEOUT_MS = 15_000;
const ANSWER_BYTES_MAX = 1024 * 1024;

export type Forward = { port: number; close(): Promise<void> };

export class NetworkSpace {
  readonly #socket: string;
  readonly #servers = new Set<Server>();
  readonly #sockets = new Set<Socket>();
  /** Process id whose namespaces are the space's. */
  readonly pid: number;

  private constructor(socket: string, pid: number) {
    this.#socket = socket;
    this.pid = pid;
  }

  /** Makes the namespace; it ends with `processes`. */
  static async open(folder: string, processes: Guarded, hasPodNetworks = false): Promise<NetworkSpace> {
    const socket = join(folder, "door.sock");
    const local = [hasPodNetworks ? OWN_NETWORK : POD_NETWORK, SERVICE_NETWORK];
    const routes = local.map((network) => `ip route add local ${network} dev lo`);
    const router = [
      `ip address add ${SPACE_ADDRESS}/32 dev lo`,
      `ip address add ${GATEWAY}/32 dev lo`,
      "echo 1 >/proc/sys/net/ipv4/ip_forward",
    ];
    const setUp = ["ip link set lo up", ...routes, ...(hasPodNetworks ? router : []), 'exec "$0" "$@"'].join(" && ");
    const said = heard(processes, "door", "open");
    processes.spawn({
      id: "door",
      command: "unshare",
      args: ["--net", "sh", "-c", setUp, process.execPath, join(import.meta.dirname, "door.ts"), socket],
      env: { PATH: process.env.PATH ?? "" },
      log: join(folder, "door.log"),
      watchesStdin: true,
    });
    await said;
    const door = processes.children.get("door");
    if (door?.state !== "running") throw new Error(`the namespace's door is ${door?.state}`);
    return new NetworkSpace(socket, door.pid);
  }

  /** Command line that runs `command` inside the space. */
  inside(command: string, args: readonly string[]): { command: string; args: string[] } {
    return { command: "nsenter", args: ["--target", String(this.pid), "--net", "--", command, ...args] };
  }

  /** A connection to an address of the space. Rejects with the reason where none is accepted. */
  async dial(address: string, port: number): Promise<Socket> {
    const socket = connect({ path: this.#socket, allowHalfOpen: true });
    this.#sockets.add(socket);
    socket.once("close", () => this.#sockets.delete(socket));
    try {
      socket.write(`${address} ${port}\n`);
      const answer = await firstLine(socket);
      if (answer !== "+") throw new Error(`${address}:${port}: ${answer.slice(1) || "closed"}`);
      return socket;
    } catch (cause) {
      socket.destroy();
      throw cause;
    }
  }

  /** One GET inside the space, for probes and health. */
  async get(
    url: { address: string; port: number; path: string; headers?: Record<string, string> },
    signal: AbortSignal,
  ) {
    const socket = await this.dial(url.address, url.port);
    return await new Promise<{ status: number; body: string }>((done, fail) => {
      const asked = request(
        {
          path: url.path,
          headers: { host: `${url.address}:${url.port}`, ...url.headers },
          signal,
          createConnection: () => socket,
        },
        (answer) => {
          let body = "";
          answer.on("data", (chunk: Buffer) => {
            if (body.length < ANSWER_BYTES_MAX) body += chunk.toString();
          });
          answer.on("end", () => done({ status: answer.statusCode ?? 0, body }));
          answer.on("error", fail);
        },
      );
      asked.on("error", fail);
      asked.end();
    }).finally(() => socket.destroy());
  }

  /** A loopback port of this machine that leads to an address of the space. */
  async forward(address: string, port: number): Promise<Forward> {
    const server = createServer({ allowHalfOpen: true, noDelay: true }, (near) => {
      near.on("error", () => near.destroy());
      this.dial(address, port).then(
        (far) => {
          far.on("error", () => near.destroy());
          far.on("close", () => near.destroySoon());
          near.on("close", () => far.destroySoon());
          near.pipe(far);
          far.pipe(near);
        },
        () => near.resetAndDestroy(), // what a closed port does
      );
      this.#sockets.add(near);
      near.once("close", () => this.#sockets.delete(near));
    });
    this.#servers.add(server);
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    const bound = server.address();
    if (bound === null || typeof bound === "string") throw new Error("a forward listens on a port");
    const close = async () => {
      this.#servers.delete(server);
      server.close();
    };
    return { port: bound.port, close };
  }

  /** Closes every forward and connection. The namespace itself ends with its processes. */
  close(): void {
    for (const server of this.#servers) server.close();
    for (const socket of this.#sockets) socket.destroy();
  }
}

async function firstLine(socket: Socket): Promise<string> {
  let line = "";
  return await new Promise((done, fail) => {
    const read = () => {
      for (let byte = socket.read(1); byte !== null; byte = socket.read(1)) {
        if (byte.toString() === "\n") {
          socket.off("readable", read);
          return done(line);
        }
        line += byte.toString();
      }
    };
    socket.on("readable", read);
    socket.once("end", () => done(line));
    socket.once("close", () => done(line));
    socket.on("error", fail);
  });
}

/** Resolves when child `id` says `wanted`; rejects with its last words where it ends first. */
export function heard(processes: Guarded, id: string, wanted: string): Promise<void> {
  return new Promise((done, fail) => {
    const timer = setTimeout(() => finish(new Error(`${id} did not say "${wanted}"`)), OPEN_TIMEOUT_MS);
    const line = (from: string, text: string) => from === id && text === wanted && finish();
    const change = (changed: string) => {
      const seen = processes.children.get(id);
      if (changed === id && seen?.state === "exited") finish(new Error(`${id} ended: ${seen.detail}`));
    };
    const finish = (error?: Error) => {
      clearTimeout(timer);
      processes.off("line", line).off("change", change);
      if (error) fail(error);
      else done();
    };
    processes.on("line", line).on("change", change);
  });
}
