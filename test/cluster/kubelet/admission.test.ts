// The chart's admission policies on a real API server: what the CRDs cannot say. Who asks is impersonated, with every right, so
// that nothing but the policies refuses.
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { groupObject, minimalDeployment, planObject } from "../../controller/api/objects.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import type { Output } from "../controlplane/start.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";
import { installCrds } from "./controller.ts";

const CHART = join(import.meta.dirname, "../../../charts/muster");
const POLICY = "templates/admission-policy.yaml";
const RELEASE = ["muster", CHART, "--namespace", "muster-system", "--show-only", POLICY];
const CONTROLLER = "system:serviceaccount:muster-system:muster-controller";
const COLLECTOR = "system:serviceaccount:kube-system:generic-garbage-collector";
const why = whyNoControlPlane();

const pod = (name: string, labels: Record<string, string>) => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name, labels },
  spec: { schedulingGates: [{ name: "muster.dev/gang" }], containers: [{ name: "main", image: "none" }] },
});
const WORKER = { "muster.dev/group": "chat-abcde-0", "muster.dev/incarnation": "1", "muster.dev/worker": "0" };

describe.skipIf(why !== undefined)(`admission policies on a real API server${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({ nodes: [] });
    await installCrds(bed);
    const { code, stdout, stderr } = await bed.plane.helm(["template", ...RELEASE]);
    expect(code, stderr).toBe(0);
    const applied = await bed.plane.kubectl(["apply", "-f", "-"], stdout);
    expect(applied.code, applied.stderr).toBe(0);
    // Policies are in force when the API server has seen them, not when they are stored.
    const isInForce = async () => {
      const create = ["create", "--dry-run=server", "-f", "-"];
      const answers = [await as("jane", create, groupObject({})), await as("jane", create, pod("probe", WORKER))];
      return answers.every(({ code }) => code !== 0);
    };
    await until(isInForce, "the policies are in force");
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  async function as(user: string, args: readonly string[], input?: unknown): Promise<Output> {
    const groups = user === COLLECTOR ? ["system:serviceaccounts:kube-system", "system:masters"] : ["system:masters"];
    const who = [`--as=${user}`, ...groups.map((group) => `--as-group=${group}`)];
    return await bed.plane.kubectl([...who, ...args], input === undefined ? "" : JSON.stringify(input));
  }

  async function allowed(user: string, args: readonly string[], input?: unknown): Promise<void> {
    const { code, stderr } = await as(user, args, input);
    expect(code, `${user}: ${args.join(" ")}: ${stderr}`).toBe(0);
  }

  async function refused(user: string, args: readonly string[], input?: unknown): Promise<string> {
    const { code, stderr } = await as(user, args, input);
    expect(code, `${user}: ${args.join(" ")} went through`).not.toBe(0);
    expect(stderr).toContain("ValidatingAdmissionPolicy");
    return stderr.replaceAll(/\s+/g, " ");
  }

  const CREATE = ["create", "-f", "-"];
  const merge = (kind: string, name: string, change: unknown) => [
    "patch",
    kind,
    name,
    "--type=merge",
    "-p",
    JSON.stringify(change),
  ];

  test("ShardPlans and ReplicaGroups are made and changed by the controller alone; anybody may delete them", async () => {
    const plan = planObject({});
    const group = groupObject({});
    expect(await refused("jane", CREATE, plan)).toContain("edit the ModelDeployment or DraftPool that owns it");
    expect(await refused("jane", CREATE, group)).toContain("ReplicaGroups are made by the Muster controller");
    await allowed(CONTROLLER, CREATE, plan);
    await allowed(CONTROLLER, CREATE, group);
    const { name } = group.metadata;
    const drain = { spec: { state: "Draining" } };
    expect(await refused("jane", merge("rgroup", name, drain))).toContain("its replicas, for one");
    expect(await refused("jane", merge("splan", plan.metadata.name, { metadata: { labels: { a: "b" } } }))).toContain(
      "muster.dev/replan",
    );
    const serving = { status: { phase: "Serving", leader: "10.0.0.1:1" } };
    await refused("jane", [...merge("rgroup", name, serving), "--subresource=status"]);
    await allowed(COLLECTOR, merge("rgroup", name, { metadata: { labels: { collected: "no" } } }));
    await allowed(CONTROLLER, merge("rgroup", name, drain));
    await allowed("jane", ["delete", "rgroup", name]);
    await allowed("jane", ["delete", "splan", plan.metadata.name]);
  });

  test("what people write is theirs", async () => {
    const { name } = minimalDeployment({}).metadata;
    await allowed("jane", CREATE, minimalDeployment({}));
    await allowed("jane", merge("mdep", name, { spec: { replicas: 2 } }));
    await allowed("jane", CREATE, pod("own", { app: "mine" }));
    await allowed("jane", merge("pod", "own", { metadata: { labels: { app: "other" } } }));
    await allowed("jane", ["delete", "mdep", name]);
  });

  test("pods of groups are made by the controller alone, whoever makes pods for a person included", async () => {
    expect(await refused("jane", CREATE, pod("forged", WORKER))).toContain(
      "apply a ModelDeployment or DraftPool instead, or leave the label out",
    );
    await refused(COLLECTOR, CREATE, pod("forged", WORKER));
    expect(await refused("jane", merge("pod", "own", { metadata: { labels: WORKER } }))).toContain("never change");
    await allowed(CONTROLLER, CREATE, pod("real", WORKER));
  });

  test("what says where a worker belongs and when it opens is not touched; the rest of it may be, and it may be deleted", async () => {
    const real = (change: unknown) => merge("pod", "real", change);
    expect(await refused("jane", real({ metadata: { labels: { "muster.dev/incarnation": "2" } } }))).toContain(
      "delete the pod to have its group begin anew",
    );
    expect(await refused("jane", real({ metadata: { labels: { "muster.dev/group": null } } }))).toContain(
      "never change",
    );
    const seats = { metadata: { annotations: { "muster.dev/seats": "gpu-a=8" } } };
    expect(await refused("jane", real(seats))).toContain("the controller's reservation");
    const open = ["patch", "pod", "real", "--type=json", "-p", '[{"op":"remove","path":"/spec/schedulingGates/0"}]'];
    expect(await refused("jane", open)).toContain("kubectl get rgroup");
    await allowed("jane", real({ metadata: { labels: { team: "search" } } }));
    await allowed(CONTROLLER, real(seats));
    await allowed(CONTROLLER, open);
    await allowed("jane", ["delete", "pod", "real", "--wait=false"]);
  });

  test("with watchNamespace the other namespaces are another installation's; disabled there is none", async () => {
    const one = await bed.plane.helm(["template", ...RELEASE, "--set", "watchNamespace=team-a"]);
    expect(one.stdout.match(/kubernetes.io\/metadata.name: team-a/g)).toHaveLength(2);
    expect((await bed.plane.helm(["template", ...RELEASE])).stdout).not.toContain("namespaceSelector");
    const none = await bed.plane.helm(["template", ...RELEASE, "--set", "admissionPolicy.enabled=false"]);
    expect(none.stdout).not.toContain("ValidatingAdmissionPolicy");
  });
});
