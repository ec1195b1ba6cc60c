// The chart on a real control plane: namespaces that enforce `restricted` admit its pods and those of workers, roles give what
// is needed and no more, an upgrade carries a changed definition, and an uninstall keeps what is the users'. No node is there:
// pods are made and admitted, not run.
import { cpSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { parse, stringify } from "yaml";
import { z } from "zod";
import type { KubeObject } from "../../../controller/kube/api/client.ts";
import { workerPod } from "../../../controller/kube/groups/pods.ts";
import { parseTemplate } from "../../../controller/kube/groups/worker-template.ts";
import { CHART } from "../../charts/render.ts";
import { identity, replicaGroup } from "../../controller/kube/groups/groups.ts";
import { until } from "../../until.ts";
import { whyNoControlPlane } from "../controlplane/binary.ts";
import { type ControlPlane, startControlPlane } from "../controlplane/start.ts";
import { BED_TIMEOUT_MS } from "./bed.ts";

const why = whyNoControlPlane();
const HOME = "muster-system";
const TEAM = "team-a";
const STEP_MS_MAX = 180_000;
const core = (plural: string, namespace = HOME) => `/api/v1/namespaces/${namespace}/${plural}`;
const apps = (plural: string) => `/apis/apps/v1/namespaces/${HOME}/${plural}`;
const OURS = `/apis/muster.dev/v1alpha1/namespaces/${HOME}`;
const CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

const ReplicaSet = z.looseObject({
  metadata: z.looseObject({ name: z.string() }),
  spec: z.looseObject({ replicas: z.number() }),
  status: z.looseObject({
    replicas: z.number(),
    conditions: z.array(z.looseObject({ type: z.string(), message: z.string() })).default([]),
  }),
});
const SecretSeen = z.looseObject({ data: z.record(z.string(), z.string()) });
const Reviewed = z.looseObject({ status: z.looseObject({ allowed: z.boolean() }) });

describe.skipIf(why !== undefined)(
  `the chart on a real control plane${why ? ` (skipped: ${why})` : ""}`,
  { timeout: STEP_MS_MAX },
  () => {
    let plane: ControlPlane;

    beforeAll(async () => {
      plane = await startControlPlane({ dir: mkdtempSync(join(tmpdir(), "muster-chart-plane-")) });
      for (const name of [HOME, TEAM]) {
        const labels = { "pod-security.kubernetes.io/enforce": "restricted" };
        const body = { apiVersion: "v1", kind: "Namespace", metadata: { name, labels } };
        await plane.api.ask({ method: "POST", path: "/api/v1/namespaces", body });
      }
    }, BED_TIMEOUT_MS);
    afterAll(async () => {
      await plane?.stop();
    });

    /** Throws with Helm's words where it fails. */
    async function helm(...args: string[]): Promise<string> {
      const { code, stdout, stderr } = await plane.helm([...args, "--namespace", HOME]);
      if (code !== 0) throw new Error(`helm ${args.join(" ")} ended with ${code}: ${stderr}`);
      return stdout;
    }
    const values = ["--set", `workloadNamespaces={${TEAM}}`, "--set", "redis.enabled=true,redis.passwordSecret=queue"];
    const apiKey = async () => SecretSeen.parse(await plane.api.find(`${core("secrets")}/muster-api-key`)).data.key;

    /** Whether one of the chart's service accounts, or a user, may do this. */
    async function may(user: string, verb: string, what: string, namespace?: string): Promise<boolean> {
      const [resource = "", name] = what.split("/");
      const [plural = "", ...group] = resource.split(".");
      const [main, subresource] = plural.split(":");
      const attributes = { verb, resource: main, subresource, group: group.join("."), name, namespace };
      const body = {
        apiVersion: "authorization.k8s.io/v1",
        kind: "SubjectAccessReview",
        spec: { user, groups: ["system:authenticated"], resourceAttributes: attributes },
      };
      const path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
      return Reviewed.parse(await plane.api.ask({ method: "POST", path, body })).status.allowed;
    }
    const account = (name: string, namespace = HOME) => `system:serviceaccount:${namespace}:${name}`;

    test("installs: the API server takes every object, and the namespace that is restricted admits every pod", async () => {
      const said = await helm("install", "muster", CHART, ...values);
      expect(said).toContain("kubectl wait");
      const wanted: Record<string, number> = { controller: 2, gateway: 2, nats: 1, redis: 1 };
      const replicaSets = async () =>
        (await plane.api.list(apps("replicasets"))).items.map((item) => ReplicaSet.parse(item));
      const areMade = async () => {
        const sets = await replicaSets();
        const refused = sets.flatMap(({ status }) => status.conditions.filter(({ type }) => type === "ReplicaFailure"));
        if (refused.length > 0) throw new Error(refused.map(({ message }) => message).join("; "));
        return (
          sets.length === Object.keys(wanted).length &&
          sets.every(({ spec, status }) => status.replicas === spec.replicas)
        );
      };
      await until(areMade, "every ReplicaSet has its pods", STEP_MS_MAX);
      for (const [component, count] of Object.entries(wanted)) {
        const { items } = await plane.api.list(
          `${core("pods")}?labelSelector=app.kubernetes.io/component%3D${component}`,
        );
        expect(items.length, component).toBe(count);
      }
    });

    test("`helm test` is admitted there too", async () => {
      const manifest = await helm("get", "hooks", "muster");
      const path = `${core("pods")}?dryRun=All`;
      await plane.api.ask({ method: "POST", path, body: parse(manifest) });
    });

    test("a restricted workload namespace admits a worker's pod, and would refuse one that asks for more", async () => {
      const { stdout } = await plane.kubectl(["get", "configmap", "-n", HOME, "muster-worker-template", "-o", "json"]);
      const template = parseTemplate(
        SecretSeen.parse(JSON.parse(stdout)).data["worker-template.yaml"] ?? "",
        "muster/worker:1",
      );
      const who = identity({ group: replicaGroup("chat-g0", TEAM) });
      const admit = async (pod: KubeObject) => {
        const args = ["create", "--as", account("muster-controller"), "--dry-run=server", "-f", "-"];
        return await plane.kubectl(args, JSON.stringify(pod));
      };
      expect(await admit(workerPod(who, template))).toMatchObject({ code: 0 });
      const asksForMore = { patch: { hostCache: { path: "/var/cache/muster" }, ipcLock: false } };
      const { code, stderr } = await admit(workerPod(who, template, asksForMore));
      expect(stderr).toContain("violates PodSecurity");
      expect(code).not.toBe(0);
    });

    test("the controller may do its work, by name where there are names, and nothing beside it", async () => {
      const who = account("muster-controller");
      const mays: [string, string, string?][] = [
        ["list", "modeldeployments.muster.dev"],
        ["update", "modeldeployments:status.muster.dev", "anywhere"],
        ["create", "shardplans.muster.dev", "anywhere"],
        ["patch", "replicagroups.muster.dev", "anywhere"],
        ["create", "events.events.k8s.io", "anywhere"],
        ["watch", "nodes"],
        ["watch", "pods"],
        ["list", "resourceslices.resource.k8s.io"],
        ["get", "persistentvolumes"],
        ["get", "persistentvolumeclaims", TEAM],
        ...["services", "poddisruptionbudgets.policy", "podgroups.scheduling.k8s.io"].map((what): [string, string] => [
          "watch",
          what,
        ]),
        ...[HOME, TEAM].flatMap((place): [string, string, string][] => [
          ...["get", "create", "patch", "delete"].map((verb): [string, string, string] => [verb, "pods", place]),
          ["create", "services", place],
          ["patch", "poddisruptionbudgets.policy", place],
          ["delete", "podgroups.scheduling.k8s.io", place],
        ]),
        ["patch", "configmaps/muster-ca", TEAM],
        ["get", "secrets/muster-ca", HOME],
        ["update", "secrets/muster-nats", HOME],
        ["create", "secrets", HOME],
        ["update", "leases.coordination.k8s.io/muster-controller", HOME],
        ["watch", "endpointslices.discovery.k8s.io/muster-leader", HOME],
        ["patch", "endpointslices.discovery.k8s.io/muster-leader", HOME],
        ["get", "services/muster-leader", HOME],
      ];
      const nots: [string, string, string?][] = [
        ["list", "secrets", HOME],
        ["get", "secrets/muster-api-key", HOME],
        ["get", "secrets/muster-ca", TEAM],
        ["create", "secrets", TEAM],
        ["patch", "endpointslices.discovery.k8s.io/other", HOME],
        ["create", "services", "anywhere"],
        ["delete", "services", HOME],
        ["list", "configmaps", HOME],
        ["create", "pods", "anywhere"],
        ["patch", "configmaps/other", TEAM],
        ["get", "configmaps/other", HOME],
        ["update", "modeldeployments.muster.dev", HOME],
        ["delete", "modeldeployments.muster.dev", HOME],
        ["patch", "nodes"],
        ["create", "pods:exec", HOME],
        ["update", "leases.coordination.k8s.io/other", HOME],
        ["escalate", "clusterroles.rbac.authorization.k8s.io"],
        ["create", "serviceaccounts:token", HOME],
      ];
      const judged = async (all: typeof mays) =>
        await Promise.all(
          all.map(async ([verb, what, place]) => `${verb} ${what} ${place}: ${await may(who, verb, what, place)}`),
        );
      expect((await judged(mays)).filter((line) => line.endsWith("false"))).toEqual([]);
      expect((await judged(nots)).filter((line) => line.endsWith("true"))).toEqual([]);
    });

    test("the gateway only reads groups, plans and deployments; a worker's account may do nothing", async () => {
      const gateway = account("muster-gateway");
      for (const kind of ["replicagroups", "shardplans", "modeldeployments"]) {
        expect(await may(gateway, "watch", `${kind}.muster.dev`)).toBe(true);
        expect(await may(gateway, "patch", `${kind}.muster.dev`, HOME)).toBe(false);
      }
      for (const [user, verb, what] of [
        [gateway, "list", "secrets"],
        [gateway, "list", "pods"],
        [gateway, "create", "configmaps"],
        [account("muster-worker", TEAM), "list", "pods"],
        [account("muster-worker", TEAM), "get", "replicagroups.muster.dev"],
      ] as const)
        expect(await may(user, verb, what, TEAM), `${user} ${verb} ${what}`).toBe(false);
    });

    test("people with edit in a namespace write deployments there; with view they read", async () => {
      for (const [name, role] of [
        ["ann", "edit"],
        ["vic", "view"],
      ]) {
        const body = {
          apiVersion: "rbac.authorization.k8s.io/v1",
          kind: "RoleBinding",
          metadata: { name, namespace: TEAM },
          roleRef: { apiGroup: "rbac.authorization.k8s.io", kind: "ClusterRole", name: role },
          subjects: [{ kind: "User", name, apiGroup: "rbac.authorization.k8s.io" }],
        };
        await plane.api.ask({
          method: "POST",
          path: `/apis/rbac.authorization.k8s.io/v1/namespaces/${TEAM}/rolebindings`,
          body,
        });
      }
      const deployments = "modeldeployments.muster.dev";
      await until(async () => await may("ann", "create", deployments, TEAM), "the roles are aggregated");
      expect(await may("vic", "list", "replicagroups.muster.dev", TEAM)).toBe(true);
      expect(await may("vic", "create", deployments, TEAM)).toBe(false);
      expect(await may("ann", "create", "shardplans.muster.dev", TEAM)).toBe(false);
      expect(await may("ann", "create", deployments, HOME)).toBe(false);
    });

    test("the next command of the notes works", async () => {
      const notes = await helm("get", "notes", "muster");
      const example = /<<END\n([\s\S]*?)\n *END/.exec(notes)?.[1] ?? "";
      await plane.serves(`${OURS}/modeldeployments`);
      const applied = await plane.kubectl(["apply", "-n", HOME, "-f", "-"], example);
      expect(applied).toMatchObject({ code: 0 });
      expect(await plane.api.find(`${OURS}/modeldeployments/nano`)).toBeDefined();
    });

    test("an upgrade carries a changed definition, keeps the clients' key and users' objects", async () => {
      const key = await apiKey();
      const changed = mkdtempSync(join(plane.dir, "chart-"));
      cpSync(CHART, changed, { recursive: true });
      const file = join(changed, "templates/crds/modeldeployments.yaml");
      const crd = z
        .looseObject({
          spec: z.looseObject({
            versions: z.tuple([z.looseObject({ additionalPrinterColumns: z.array(z.unknown()) })]),
          }),
        })
        .parse(parse(readFileSync(file, "utf8")));
      crd.spec.versions[0].additionalPrinterColumns.push({ name: "Next", type: "string", jsonPath: ".status.next" });
      writeFileSync(file, stringify(crd));
      await helm("upgrade", "muster", changed, ...values, "--set", "gateway.replicas=3");
      expect(JSON.stringify(await plane.api.find(`${CRDS}/modeldeployments.muster.dev`))).toContain(".status.next");
      expect(await plane.api.find(`${apps("deployments")}/muster-gateway`)).toMatchObject({ spec: { replicas: 3 } });
      expect(await apiKey()).toBe(key);
      expect(await plane.api.find(`${OURS}/modeldeployments/nano`)).toBeDefined();
    });

    test("an uninstall keeps definitions, users' objects and the key; the next installation takes them over", async () => {
      const key = await apiKey();
      await helm("uninstall", "muster", "--wait");
      for (const kind of ["modeldeployments", "draftpools", "shardplans", "replicagroups"])
        expect(await plane.api.find(`${CRDS}/${kind}.muster.dev`), kind).toBeDefined();
      expect(await plane.api.find(`${OURS}/modeldeployments/nano`)).toMatchObject({ metadata: { name: "nano" } });
      for (const path of [
        apps("deployments"),
        core("services"),
        `/apis/networking.k8s.io/v1/namespaces/${TEAM}/networkpolicies`,
      ])
        expect((await plane.api.list(path)).items, path).toEqual([]);
      expect(await may(account("muster-controller"), "list", "nodes")).toBe(false);
      await helm("install", "muster", CHART, ...values);
      expect(await apiKey()).toBe(key);
    });
  },
);
