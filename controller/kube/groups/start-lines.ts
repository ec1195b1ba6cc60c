// Where groups wait for their turn to start. Thousands that start at once would all be half begun when their reservations are
// over (T of reservations.ts), and everything else would wait behind their calls: the Lease, deployments, who serves.
import { Slots } from "../watch/slots.ts";

/** Those that begin (P2 of kube-cluster.ts), and those that create their pods and open them (P3), in the order of coming. */
export type StartLines = { begin: Slots; create: Slots };

/** With a call each under way they fill what the API lets through, and leave room for the others. */
const STARTS_AT_ONCE = 8;

export function startLines(): StartLines {
  return { begin: new Slots(STARTS_AT_ONCE), create: new Slots(STARTS_AT_ONCE) };
}
