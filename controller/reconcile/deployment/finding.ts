// The one cause of an owner's phase, from its plan and its groups (DESIGN.md section 2). Pure; owns which of several causes
// is said, not how it is stored.
//
//   F1  what no replica can be made of comes first (Infeasible), then what the first replica waits for, then what serves.
//   F2  a deployment that answers requests is Serving, or Degraded where a replica that once served is missing.
import { type Cause, PHASES, type PhaseName } from "../../api/conditions.ts";
import { isServing, type Steps } from "./rollout.ts";
import type { Chosen } from "./stored-plan.ts";
import type { DeploymentWorld, GroupView } from "./world.ts";

export type Finding = { phase: PhaseName; cause: Omit<Cause, "since"> };

export type Standing = {
  chosen: Chosen;
  wanted: number;
  steps: Steps;
  staying: readonly GroupView[];
  /** What a replacement that finds no place needs. */
  shortage: string | undefined;
};

const finding = (phase: PhaseName, code: string, message: string): Finding => ({ phase, cause: { code, message } });

export function refusedFinding(fault: { field: string; detail: string; code: string }): Finding {
  return finding(
    "Infeasible",
    codeOf(fault.code),
    fault.field === "" ? fault.detail : `${fault.field}: ${fault.detail}`,
  );
}

export function findingOf(world: DeploymentWorld, standing: Standing): Finding {
  const { chosen, wanted, staying } = standing;
  const serving = staying.filter(isServing);
  if (chosen.kind === "none") {
    const goesOn = serving.length > 0 ? `; ${serving.length} replicas of the plan before go on serving` : "";
    const { why } = chosen;
    if (why?.kind === "infeasible") return infeasible(why, goesOn);
    if (why?.kind === "refused") {
      const refused = refusedFinding(why.fault);
      return { ...refused, cause: { ...refused.cause, message: `${refused.cause.message}${goesOn}` } };
    }
    if (wanted > 0 && serving.length === 0 && staying.length === 0) return unplanned(why);
  }
  if (wanted === 0) return stopped(world);
  const left = serving.length >= wanted ? leavingOf(world, standing) : undefined;
  if (left !== undefined) return left;
  if (serving.length >= wanted) return finding("Serving", "serving", `${serving.length} of ${wanted} replicas serve`);
  return serving.length > 0 ? partly(standing, serving.length) : first(standing);
}

function infeasible(
  why: { reasons: readonly { code: string; text: string }[]; remedy: string | undefined },
  goesOn: string,
) {
  const [reason] = why.reasons;
  const text = why.reasons.map((each) => each.text).join(" ");
  const remedy = why.remedy === undefined ? " No single change was found that fits." : ` What would do: ${why.remedy}.`;
  return finding("Infeasible", codeOf(reason?.code ?? "infeasible"), `${text}${remedy}${goesOn}`);
}

function unplanned(why: Extract<Chosen, { kind: "none" }>["why"]): Finding {
  if (why?.kind === "failed")
    return finding("Scheduling", "source-unreadable", `no plan yet: ${why.detail}; it is tried again`);
  return finding("Scheduling", "planning", "the headers are read and cuts are compared");
}

function stopped({ owner }: DeploymentWorld): Finding {
  const isAuto = owner.wish.kind === "ok" && owner.wish.value.scale.kind === "auto";
  return isAuto
    ? finding("Stopped", "asleep", "nothing is asked for; the next request wakes it")
    : finding("Stopped", "scaled-to-zero", "no replicas are wanted");
}

/** All serve, one on a node that is to be left: what comes in its place, or that nothing can. */
function leavingOf({ leaving }: DeploymentWorld, { steps, staying, shortage }: Standing): Finding | undefined {
  const [group] = steps.leaving;
  const node = group?.status.placement?.find((seat) => leaving.has(seat.node))?.node;
  if (group === undefined || node === undefined) return undefined;
  const why = `node ${node} ${leaving.get(node)}`;
  if (shortage !== undefined) {
    const text = `${why} and ${shortage}: ${group.name} serves there until there is room, the node is uncordoned or its pods are deleted`;
    return finding("Degraded", "no-replacement", text);
  }
  const newest = staying.toSorted((one, other) => other.spec.ordinal - one.spec.ordinal).find(isNew);
  const who = newest === undefined ? "another replica" : newest.name;
  const how = newest === undefined || isServing(newest) ? "" : ` (${saidOf(newest)})`;
  return finding("Serving", "node-leaving", `${why}: ${who} comes in place of ${group.name}${how}`);

  function isNew(one: GroupView): boolean {
    return one.spec.plan === group?.spec.plan && one.spec.ordinal > group.spec.ordinal && !steps.leaving.includes(one);
  }
}

function partly({ wanted, staying }: Standing, serving: number): Finding {
  const missing = staying.filter((group) => !isServing(group));
  const broken = missing.find(({ status }) => (status.restarts ?? 0) > 0 || status.phase === "Degraded");
  const named = broken ?? missing[0];
  const rest = named === undefined ? "" : `; ${saidOf(named)}`;
  const text = `${serving} of ${wanted} replicas serve${rest}`;
  return broken === undefined ? finding("Serving", "scaling", text) : finding("Degraded", "replica-lost", text);
}

/** Nothing serves: what the replica waits for whose cause comes first. */
function first({ staying, wanted }: Standing): Finding {
  const place = ({ status }: GroupView): number => PHASES.indexOf(status.phase ?? "Scheduling");
  const [worst] = staying.toSorted((one, other) => place(one) - place(other));
  if (worst === undefined) return finding("Scheduling", "creating", `${wanted} replicas are being made`);
  const { phase = "Scheduling", cause } = worst.status;
  const shown = phase === "Serving" ? "Connecting" : phase;
  const made = finding(shown, cause?.code ?? "starting", saidOf(worst));
  return { ...made, cause: { ...made.cause, ...loadOf(staying) } };
}

function saidOf({ name, status }: GroupView): string {
  const { phase, cause } = status;
  if (phase === undefined) return `${name} is being taken up`;
  return cause === undefined ? `${name}: ${phase}` : `${name}: ${cause.message}`;
}

/** Bytes of all that load; the end is that of the one that is first to serve. */
function loadOf(groups: readonly GroupView[]): Pick<Cause, "bytesLoaded" | "bytesTotal" | "eta"> {
  const causes = groups.flatMap(({ status }) => status.cause ?? []);
  const sum = (values: readonly (number | undefined)[]) => values.reduce<number>((all, value) => all + (value ?? 0), 0);
  const total = sum(causes.map(({ bytesTotal }) => bytesTotal));
  const [eta] = causes.flatMap((cause) => cause.eta ?? []).toSorted();
  const bytes = total > 0 ? { bytesLoaded: sum(causes.map(({ bytesLoaded }) => bytesLoaded)), bytesTotal: total } : {};
  return { ...bytes, ...(eta === undefined ? {} : { eta }) };
}

/** Causes are kebab-case, faults of the wire have underscores. */
function codeOf(code: string): string {
  return code.replaceAll("_", "-").slice(0, 64);
}
