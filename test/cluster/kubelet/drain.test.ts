// `kubectl drain` of a node that serves, on a real control plane: another replica first, then the node is free and the drain ends
// by itself; where there is no other place the disruption budget holds the eviction and status says so.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { BED_TIMEOUT_MS, Bed } from "./bed.ts";
import { controllerSaid, installCrds, startController } from "./controller.ts";
import { Deployment, Group, groupsOf, nanoDeployment, SERVE_MS_MAX } from "./serving.ts";

const OURS = "/apis/muster.dev/v1alpha1/namespaces/default";
const STEP_MS_MAX = SERVE_MS_MAX + 120_000;
const why = whyNoControlPlane();

const DEPLOYMENT = nanoDeployment({ gpu: { count: 2, topology: { nodes: 1 } }, rollout: { drainTimeout: "2s" } });

describe.skipIf(why !== undefined)(`kubectl drain on a real control plane${why ? ` (skipped: ${why})` : ""}`, () => {
  let bed: Bed;

  beforeAll(async () => {
    bed = await Bed.start({
      nodes: [
        { name: "gpu-a", gpus: 2 },
        { name: "gpu-b", gpus: 2 },
      ],
    });
    await installCrds(bed);
    startController(bed);
  }, BED_TIMEOUT_MS);
  afterAll(async () => {
    await bed?.stop();
  });

  const groups = () => groupsOf(bed, "nano");
  const status = async () => Deployment.parse(await bed.plane.api.find(`${OURS}/modeldeployments/nano`)).status;
  const nodeOf = (group: Group | undefined): string => group?.status.placement[0]?.node ?? "";

  /** The one group, once it serves. */
  async function alone(what: string, isSo: (group: Group) => boolean = () => true): Promise<Group> {
    let all: Group[] = [];
    const look = async () => {
      if (!bed.plane.processes.isRunning("controller"))
        throw new Error(`the controller has ended: ${controllerSaid(bed)}`);
      all = await groups();
      const { phase } = await status();
      const [only] = all;
      return all.length === 1 && only?.status.phase === "Serving" && phase === "Serving" && isSo(only);
    };
    await until(look, what, SERVE_MS_MAX).catch(async (error) => {
      const { cause } = await status();
      throw new Error(`${error.message}; ${cause?.message}; ${JSON.stringify(all)}\n${controllerSaid(bed)}`);
    });
    return Group.parse(all[0]);
  }

  const drain = (node: string, timeout: string) =>
    bed.plane.kubectl(["drain", node, "--delete-emptydir-data", "--ignore-daemonsets", `--timeout=${timeout}`]);
  const cordon = async (node: string, isCordoned: boolean) => {
    const { code, stderr } = await bed.plane.kubectl([isCordoned ? "cordon" : "uncordon", node]);
    expect(code, stderr).toBe(0);
  };

  test(
    "another group serves before the node is free, and the drain ends by itself",
    async () => {
      await bed.make(`${OURS}/modeldeployments`, DEPLOYMENT);
      const before = await alone("nano serves");
      const node = nodeOf(before);
      const other = node === "gpu-a" ? "gpu-b" : "gpu-a";
      const ended = drain(node, "110s");
      let isOver = false;
      void ended.then(() => {
        isOver = true;
      });
      const causes = new Set<string>();
      let looks = 0;
      while (!isOver) {
        const { cause, conditions } = await status();
        if (cause !== undefined) causes.add(cause.message);
        expect(conditions.find(({ type }) => type === "Serving")?.status, cause?.message).toBe("True");
        const serving = (await groups()).filter((group) => group.status.phase === "Serving");
        expect(serving.length, `look ${looks}: ${cause?.message}`).toBeGreaterThan(0);
        looks += 1;
      }
      const { code, stderr } = await ended;
      expect(code, stderr).toBe(0);
      expect(looks).toBeGreaterThan(5);
      expect([...causes].find((text) => text.startsWith(`node ${node} is cordoned`))).toContain(
        `comes in place of ${before.metadata.name}`,
      );
      const after = await alone("the replacement serves alone");
      expect(nodeOf(after)).toBe(other);
      expect(after.metadata.uid).not.toBe(before.metadata.uid);
      const events = await bed.plane.kubectl(["get", "events", "-o", "jsonpath={.items[*].message}"]);
      expect(events.stdout).toContain(`node ${node} is cordoned: `);
      await cordon(node, false);
    },
    STEP_MS_MAX,
  );

  test(
    "without another place the budget holds the eviction, status says what is missing, and it goes on serving",
    async () => {
      const before = await alone("nano serves");
      const node = nodeOf(before);
      const other = node === "gpu-a" ? "gpu-b" : "gpu-a";
      await cordon(other, true);
      const { code, stderr } = await drain(node, "8s");
      expect(code).not.toBe(0);
      expect(stderr).toContain("disruption budget");
      await until(async () => (await status()).cause?.code === "no-replacement", "it is said", 60_000);
      const { phase, cause, conditions } = await status();
      expect(phase).toBe("Degraded");
      expect(cause?.message).toBe(
        `node ${node} is cordoned and another replica needs 2 more GPUs: ${before.metadata.name} serves there until there is room, the node is uncordoned or its pods are deleted`,
      );
      expect(conditions.find(({ type }) => type === "Serving")?.status).toBe("True");
      expect((await groups()).map(({ metadata, status: { phase } }) => [metadata.uid, phase])).toEqual([
        [before.metadata.uid, "Serving"],
      ]);
      await cordon(other, false);
      const again = await drain(node, "110s");
      expect(again.code, again.stderr).toBe(0);
      const after = await alone("the replacement serves alone", (group) => nodeOf(group) === other);
      expect(after.metadata.uid).not.toBe(before.metadata.uid);
      await cordon(node, false);
    },
    STEP_MS_MAX,
  );

  test(
    "names and budget of a group are mended when somebody edits or deletes them, and go with it",
    async () => {
      const { name } = (await alone("nano serves")).metadata;
      const kubectl = async (...args: string[]) => {
        const { code, stdout, stderr } = await bed.plane.kubectl(args);
        expect(code, `${args.join(" ")}: ${stderr}`).toBe(0);
        return stdout;
      };
      expect(await kubectl("get", "service", name, "-o", "jsonpath={.spec.clusterIP}")).toBe("None");
      await kubectl("patch", "pdb", name, "--type=merge", "-p", '{"spec":{"minAvailable":0}}');
      const least = () => kubectl("get", "pdb", name, "-o", "jsonpath={.spec.minAvailable}");
      await until(async () => (await least()) === "1", "the budget is as it was", 30_000);
      await kubectl("delete", "service", name);
      await until(
        async () => (await kubectl("get", "services", "-o", "name")).includes(name),
        "the name is back",
        30_000,
      );
      await bed.remove(`${OURS}/modeldeployments/nano`);
      const isGone = async () => !(await kubectl("get", "services,pdb,pods", "-o", "name")).includes("nano");
      await until(isGone, "nothing of it is left", SERVE_MS_MAX);
    },
    STEP_MS_MAX,
  );
});
