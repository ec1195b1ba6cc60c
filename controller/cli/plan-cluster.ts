// `muster plan -f`: what the controller of a cluster would do with these owners, one after the other, each on what the ones
// before it leave. Reads the cluster once and writes nothing. Owns the connection and the order; what would be done is
// controller/kube/what-if/what-if.ts, how it is printed plan-text.ts.
import { FaultError, invalid } from "../../proto/fault.ts";
import { Connections } from "../kube/api/connections.ts";
import { kubeconfigCredentials } from "../kube/api/credentials.ts";
import { HttpKubeApi } from "../kube/api/http-api.ts";
import { foresee } from "../kube/what-if/what-if.ts";
import { applyChange, type Change, parseChange } from "../kube/what-if/what-if-changes.ts";
import { readSnapshot } from "../kube/what-if/what-if-snapshot.ts";
import { type Seat, Stage } from "../kube/what-if/what-if-stage.ts";
import { planQuestion } from "../reconcile/deployment/planning.ts";
import { readOwners } from "./plan-file.ts";
import { type Elsewhere, type Foresight, foresightJson, foresightText } from "./plan-text.ts";

export type ClusterFlags = {
  file: string;
  kubeconfig?: string;
  context?: string;
  namespace?: string;
  whatIf: readonly string[];
  json?: boolean;
};

const EXIT = { fits: 0, other: 1, invalid: 2, short: 3 };
const GRAVEST = [EXIT.other, EXIT.invalid, EXIT.short];
/** Reading 100,000 pods takes some 20 s. */
const READ_MS_MAX = 300_000;

/** Answers the exit code. Throws FaultError for a wrong call and KubeError for a cluster that does not answer. */
export async function planOnCluster(flags: ClusterFlags, write: (text: string) => void): Promise<number> {
  const { kubeconfig, context } = flags;
  const credentials = kubeconfigCredentials({
    ...(kubeconfig === undefined ? {} : { path: kubeconfig }),
    ...(context === undefined ? {} : { context }),
  });
  const namespace = flags.namespace ?? (await credentials.namespace());
  const owners = readOwners(flags.file, namespace);
  const changes = flags.whatIf.map((text) => changeOf(text, namespace));
  const connections = new Connections(credentials);
  try {
    const api = new HttpKubeApi({ connections });
    const { snapshot, missing } = await readSnapshot(api, AbortSignal.timeout(READ_MS_MAX));
    const stage = new Stage(snapshot, Date.now());
    const before = stage.places();
    for (const [index, change] of changes.entries()) {
      const wrong = applyChange(stage, change);
      if (wrong !== undefined) throw new FaultError(invalid(`--what-if ${flags.whatIf[index]}`, wrong));
    }
    stage.settle();
    const answers: Foresight[] = [];
    for (const owner of owners) answers.push({ owner, ...(await foresee(stage, owner, planQuestion)) });
    const said = { answers, missing, whatIf: flags.whatIf, elsewhere: elsewhere(before, stage.places(), answers) };
    write(flags.json ? `${JSON.stringify(foresightJson(said))}\n` : foresightText(said));
    const codes = answers.map(exitOf);
    return GRAVEST.find((code) => codes.includes(code)) ?? EXIT.fits;
  } finally {
    await connections.close();
  }
}

function changeOf(text: string, namespace: string): Change {
  const change = parseChange(text, namespace);
  if (typeof change === "string") throw new FaultError(invalid("--what-if", change));
  return change;
}

function exitOf({ outcome }: Foresight): number {
  switch (outcome.kind) {
    case "refused":
      return EXIT.invalid;
    case "failed":
      return EXIT.other;
    case "infeasible":
      return EXIT.short;
    case "planned":
      return outcome.waiting.length === 0 && outcome.placed.length >= outcome.wanted ? EXIT.fits : EXIT.short;
    default:
      throw new Error(`unreachable: ${JSON.stringify(outcome satisfies never)}`);
  }
}

/** Groups of nobody that was asked about, whose places are others now. */
function elsewhere(
  before: ReadonlyMap<string, readonly Seat[]>,
  after: ReadonlyMap<string, readonly Seat[]>,
  answers: readonly Foresight[],
): Elsewhere[] {
  const asked = new Set(
    answers.flatMap(({ owner, outcome }) =>
      outcome.kind === "planned"
        ? [...outcome.placed, ...outcome.waiting].map(({ group }) => `${owner.metadata.namespace}/${group}`)
        : [],
    ),
  );
  const nodesOf = (seats: readonly Seat[] | undefined) => (seats ?? []).map(({ node }) => node);
  const groups = [...new Set([...before.keys(), ...after.keys()])].toSorted();
  return groups
    .filter((group) => !asked.has(group))
    .map((group) => ({ group, from: nodesOf(before.get(group)), to: nodesOf(after.get(group)) }))
    .filter(({ from, to }) => from.join() !== to.join());
}
