// Values with which the chart runs in a bed whose pods have networks of their own: images stand for programs of the checkout, the
// machine is small, and nobody waits for clients to leave. All else is the chart's own.
import { join } from "node:path";
import { findNatsServer } from "../../controller/local/nats.ts";

const MUSTER = [process.execPath, join(import.meta.dirname, "../../controller/cli/main.ts")];
/** What pods ask for must fit the bed's nodes. */
const RESOURCES = { requests: { cpu: "10m", memory: "64Mi" } };

/** For Bed.start: what the chart's images run. Throws where there is no nats-server. */
export function bedEntrypoints(): Record<string, readonly string[]> {
  const nats = findNatsServer();
  if (nats === undefined) throw new Error("no nats-server on this machine: run `npm run setup`");
  return { "muster/control": MUSTER, nats: [nats] };
}

export function bedValues() {
  return {
    controller: { resources: RESOURCES },
    gateway: { resources: RESOURCES, drainSeconds: 2, leaveSeconds: 0 },
    nats: { resources: RESOURCES },
    worker: { template: { command: MUSTER, drainSeconds: 5 } },
    test: { command: [process.execPath] },
  };
}
