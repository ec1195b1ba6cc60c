// WorkerLinks through which only a leader sends a Load, as FencedApi has it for writes: who was paused between deciding and
// sending finds out by its own clock. Looking is free; what a worker may take is checked by the worker itself (incarnation).
import { KubeError } from "../api/client.ts";
import type { WorkerLinks } from "../workers/worker-link.ts";
import type { Term } from "./lease.ts";

export function fencedLinks(links: WorkerLinks, term: Pick<Term, "isHeld">): WorkerLinks {
  return {
    describe: (...call) => links.describe(...call),
    load: async (target, request, signal) => {
      if (!term.isHeld())
        throw new KubeError(0, "NotLeader", "a Load is not sent: this process does not lead any more");
      return links.load(target, request, signal);
    },
    forget: (uid) => links.forget(uid),
  };
}
