// What a container sees: the machine's own files (there are no images), with its volumes, hosts file, host name and device
// folder laid over them in mount and host-name namespaces of its own. Owns the script that makes the view and becomes the command.
//
//   X1  nothing that a container writes outside its volumes reaches the machine: the root is an overlay on a memory file system.
//   X2  the script becomes the command (exec): its process id is the container's, its exit code the container's.
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";

/** Where programs of containers come from; a volume over a folder above it (`/tmp`) must not hide it. */
const CHECKOUT = join(import.meta.dirname, "../../..");

export type Mount = { source: string; target: string; isReadOnly: boolean };
export type Sandbox = {
  /** Empty folder on the machine under which the view is built (seen by the container's namespace only). */
  folder: string;
  hostname: string;
  /** Hosts file on the machine; rewritten in place as names change. */
  hosts: string;
  /** File that appears as the termination message path. */
  message: { source: string; target: string };
  mounts: readonly Mount[];
  workingDir: string;
  command: readonly string[];
  /** Undefined: root. */
  user?: { user: number; group: number } | undefined;
  /** Folders of the machine that stay in view, read-only, whatever is mounted above them. Default: the checkout. */
  keep?: readonly string[];
};

const DEVICES = ["null", "zero", "full", "random", "urandom", "tty"];
const OWN = ["/proc", "/sys", "/dev", "/run"]; // made anew or not wanted

/** `sh -c SCRIPT` that, inside `unshare --mount --uts`, builds the view and becomes the command. */
export function sandboxScript(sandbox: Sandbox): string {
  const { folder, user } = sandbox;
  const become = user && `setpriv --reuid ${user.user} --regid ${user.group} --clear-groups --pdeathsig KILL -- `;
  const root = `${folder}/root`;
  const lines = [
    "set -e",
    `mount -t tmpfs sandbox ${quote(folder)}`,
    `mkdir ${["upper", "work", "root"].map((name) => quote(`${folder}/${name}`)).join(" ")}`,
    `mount -t overlay overlay -o ${quote(`lowerdir=/,upperdir=${folder}/upper,workdir=${folder}/work`)} ${quote(root)}`,
    ...otherFileSystems().map((path) => `mount --rbind -o ro ${quote(path)} ${quote(root + path)} 2>/dev/null || :`),
    `mount --rbind /proc ${quote(`${root}/proc`)}`,
    `mount --rbind /sys ${quote(`${root}/sys`)}`,
    `mount -t tmpfs run ${quote(`${root}/run`)}`,
    `mount -t tmpfs dev ${quote(`${root}/dev`)}`,
    `mkdir -m 1777 ${quote(`${root}/dev/shm`)}`,
    `ln -s /proc/self/fd ${quote(`${root}/dev/fd`)}`,
    ...DEVICES.flatMap((name) => bindFile(`/dev/${name}`, `${root}/dev/${name}`)),
    ...bindFile(sandbox.hosts, `${root}/etc/hosts`),
    ...bindFile(sandbox.message.source, root + sandbox.message.target),
    ...sandbox.mounts.flatMap(({ source, target, isReadOnly }) => [
      // Links on the way (/var/run) are followed in the view, not on the machine.
      `at=${quote(root)}$(chroot ${quote(root)} realpath -m ${quote(target)})`,
      `if [ -d ${quote(source)} ]; then mkdir -p "$at"; else mkdir -p "$(dirname "$at")"; : >>"$at"; fi`,
      `mount --bind ${quote(source)} "$at"`,
      ...(isReadOnly ? ['mount -o remount,bind,ro "$at"'] : []),
    ]),
    ...(sandbox.keep ?? [CHECKOUT])
      .filter((path) => isHidden(path, sandbox.mounts))
      .flatMap((path) => [
        `mkdir -p ${quote(root + path)}`,
        `mount --rbind -o ro ${quote(path)} ${quote(root + path)}`,
      ]),
    `hostname ${quote(sandbox.hostname)}`,
    "cd /",
    // As another user the death signal must be set again: the kernel forgets it with the change.
    // The working directory is given again inside: chroot goes to the new root.
    `exec chroot ${quote(root)} ${become ?? ""}sh -c 'cd "$0" && exec "$@"' ${[sandbox.workingDir, ...sandbox.command].map(quote).join(" ")}`,
  ];
  return lines.join("\n");
}

/** Command line that runs `command` in the view of the process `pid`. */
export function insideView(pid: number, command: readonly string[]): string[] {
  return ["nsenter", "--target", String(pid), "--mount", "--net", "--uts", "--root", "--wd=/", "--", ...command];
}

function isHidden(path: string, mounts: readonly Mount[]): boolean {
  return mounts.some(({ target }) => `${path}/`.startsWith(`${resolve(target)}/`));
}

function bindFile(source: string, target: string): string[] {
  return [`: >>${quote(target)}`, `mount --bind ${quote(source)} ${quote(target)}`];
}

/** Mount points that an overlay of `/` does not show. One that cannot be bound is missing in the view, no more. */
function otherFileSystems(): string[] {
  const points = readFileSync("/proc/self/mountinfo", "utf8")
    .split("\n")
    .map((line) => line.split(" ")[4] ?? "")
    .filter((path) => path !== "" && path !== "/" && !path.includes("\\"));
  return points.filter((path) => !OWN.some((own) => path === own || path.startsWith(`${own}/`)));
}

const quote = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;
