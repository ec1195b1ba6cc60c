// The network of one pod: a namespace of its own, joined to the cluster's space by a pair of veth devices. Its loopback is its
// own, and what it sends carries its address. Owns the namespace (held by a process that only waits) and the route to it.
//
//   Y1  all containers of a pod share it; it ends with `close`, and with the guard in any case.
//   Y2  a pod reaches other pods, Services and the space, and nothing else: the space itself has no way out.
import { execFile } from "node:child_process";
import type { Guarded } from "../../../controller/local/guarded.ts";
import { GATEWAY, heard, type NetworkSpace, SPACE_ADDRESS } from "../controlplane/network-space.ts";

const SET_UP_MS_MAX = 20_000;
/** As large as on loopback: tensors of ranks pass here. */
const MTU = 65_535;

let count = 0;

export class PodNetwork {
  readonly #processes: Guarded;
  readonly #id: string;
  /** Process whose network is the pod's. */
  readonly pid: number;

  private constructor(processes: Guarded, id: string, pid: number) {
    this.#processes = processes;
    this.#id = id;
    this.pid = pid;
  }

  /** `id` names its process among the guard's. Rejects with what could not be set up. */
  static async open(
    { space, processes }: { space: NetworkSpace; processes: Guarded },
    { id, address, log }: { id: string; address: string; log: string },
  ): Promise<PodNetwork> {
    const said = heard(processes, id, "open");
    const wait = "ip link set lo up && echo open && exec cat";
    processes.spawn({
      id,
      command: "unshare",
      args: ["--net", "sh", "-c", wait],
      env: { PATH: process.env.PATH ?? "" },
      log,
      watchesStdin: true,
    });
    await said;
    const holder = processes.children.get(id);
    if (holder?.state !== "running") throw new Error(`the network of ${address} is ${holder?.state}`);
    const device = `pod${++count}`;
    await within(space.pid, [
      `ip link add ${device} mtu ${MTU} type veth peer name eth0 mtu ${MTU} netns ${holder.pid}`,
      `ip link set ${device} up`,
      `ip route replace ${address}/32 dev ${device} src ${SPACE_ADDRESS}`,
    ]);
    await within(holder.pid, [
      `ip address add ${address}/32 dev eth0`,
      "ip link set eth0 up",
      `ip route add ${GATEWAY} dev eth0 scope link`,
      `ip route add default via ${GATEWAY} dev eth0 src ${address}`,
    ]);
    return new PodNetwork(processes, id, holder.pid);
  }

  /** Command line that runs `command` in it. */
  inside(command: string, args: readonly string[]): { command: string; args: string[] } {
    return { command: "nsenter", args: ["--target", String(this.pid), "--net", "--", command, ...args] };
  }

  /** Whoever still runs in it keeps the namespace, and loses nothing but the holder. */
  close(): void {
    this.#processes.kill(this.#id);
  }
}

function within(pid: number, commands: readonly string[]): Promise<void> {
  const args = ["--target", String(pid), "--net", "--", "sh", "-c", commands.join(" && ")];
  return new Promise((done, fail) => {
    execFile("nsenter", args, { timeout: SET_UP_MS_MAX, killSignal: "SIGKILL" }, (error, _out, said) =>
      error === null ? done() : fail(new Error(`a pod's network: ${said.trim() || error.message}`)),
    );
  });
}
