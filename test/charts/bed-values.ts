// Values with which the chart runs on one machine: pods of a process kubelet share one network space, so each listens on its own
// address alone, and images stand for programs of the checkout.
import { join } from "node:path";
import { findNatsServer } from "../../controller/local/nats.ts";

const MUSTER = [process.execPath, join(import.meta.dirname, "../../controller/cli/main.ts")];
const LISTEN_HOST = "$(MUSTER_POD_IP)";
/** The machine is small; what pods ask for must fit its nodes. */
const RESOURCES = { requests: { cpu: "10m", memory: "64Mi" } };

/** For Bed.start: what the chart's images run. Throws where there is no nats-server. */
export function bedEntrypoints(): Record<string, readonly string[]> {
  const nats = findNatsServer();
  if (nats === undefined) throw new Error("no nats-server on this machine: run `npm run setup`");
  return { "muster/control": MUSTER, nats: [nats] };
}

export function bedValues() {
  const program = { listenHost: LISTEN_HOST, resources: RESOURCES };
  return {
    controller: program,
    gateway: { ...program, drainSeconds: 2, leaveSeconds: 0 },
    nats: program,
    worker: { template: { command: MUSTER, listenHost: LISTEN_HOST, drainSeconds: 5 } },
    test: { command: [process.execPath] },
  };
}
