// The chart as rendered: what each value does, what is refused, along which edges pods may talk, and that a real nats-server
// takes the rendered configuration. What a cluster makes of it is chart-install.test.ts.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { parse } from "yaml";
import { allCrds } from "../../../controller/api/crd.ts";
import { parseTemplate } from "../../../controller/kube/groups/worker-template.ts";
import {
  CHART,
  deploymentOf,
  find,
  flagOf,
  has,
  helm,
  RELEASE_NAMESPACE,
  refusal,
  render,
} from "../../charts/render.ts";
import { BUILD_TIMEOUT_MS, whyNoControlPlane } from "../controlplane/binary.ts";

const why = whyNoControlPlane();
const DIGEST = `sha256:${"ab".repeat(32)}`;
const EVERYTHING = {
  workloadNamespaces: ["team-a", "team-b"],
  imagePullSecrets: [{ name: "registry" }],
  redis: { enabled: true, passwordSecret: "queue" },
  networkPolicy: { clients: [{ podSelector: {} }], monitoring: [{ namespaceSelector: {} }] },
  monitoring: { serviceMonitor: { enabled: true }, rules: { enabled: true }, dashboard: { enabled: true } },
  controller: { podAnnotations: { a: "b" }, nodeSelector: { pool: "cpu" }, tolerations: [{ operator: "Exists" }] },
};
/** All pods of a bed share one network space: each listens on its own address, and images stand for programs. */
const BED = {
  image: { repository: "muster/control", tag: "test" },
  worker: {
    image: { repository: "muster/worker", digest: DIGEST },
    template: { command: ["node", "main.ts"], listenHost: "$(MUSTER_POD_IP)", port: 7450, drainSeconds: 5 },
  },
  controller: {
    replicas: 3,
    listenHost: "$(MUSTER_POD_IP)",
    gangTimeoutSeconds: 30,
    extraArgs: ["--more", "1"],
    extraEnv: [{ name: "A", value: "b" }],
  },
  gateway: { replicas: 1, listenHost: "$(MUSTER_POD_IP)", extraArgs: ["--hold-seconds", "9"], drainSeconds: 3 },
  nats: { listenHost: "$(MUSTER_POD_IP)" },
};
const SETS = {
  defaults: {},
  everything: EVERYTHING,
  bed: BED,
  namespaced: { watchNamespace: "team-a", tenantRoles: false },
  external: {
    nats: { externalUrl: "tls://nats.example:4333", externalTokenSecret: "nats" },
    gateway: { apiKeySecret: "key" },
  },
};

describe.skipIf(why !== undefined)(
  `the chart, rendered${why ? ` (skipped: ${why})` : ""}`,
  { timeout: BUILD_TIMEOUT_MS },
  () => {
    test.each(Object.entries(SETS))("%s: lints, and every object has its name once", async (_name, values) => {
      const { code, stdout } = await helm(["lint", "--strict", "--kube-version", "1.33.0", CHART], values);
      expect({ code, stdout }).toMatchObject({ code: 0 });
      const names = (await render(values)).map(
        ({ kind, metadata }) => `${kind} ${metadata.namespace ?? ""}/${metadata.name}`,
      );
      expect(names.toSorted()).toEqual([...new Set(names)].toSorted());
    });

    test("definitions stay when the release goes; no custom resource and nothing that the controller writes is in it", async () => {
      for (const values of Object.values(SETS)) {
        const objects = await render(values);
        const crds = objects.filter(({ kind }) => kind === "CustomResourceDefinition");
        expect(crds.length).toBe(allCrds().length);
        for (const { metadata } of crds) expect(metadata.annotations["helm.sh/resource-policy"]).toBe("keep");
        const ours = objects.filter(
          ({ apiVersion, kind, metadata }) =>
            apiVersion.startsWith("muster.dev/") ||
            ["EndpointSlice", "Lease"].includes(kind) ||
            (["Secret muster-ca", "Secret muster-nats", "ConfigMap muster-ca"] as string[]).includes(
              `${kind} ${metadata.name}`,
            ),
        );
        expect(ours).toEqual([]);
        expect(objects.filter(({ kind }) => kind === "PersistentVolumeClaim" || kind === "StatefulSet")).toEqual([]);
      }
    });

    test("by default two controllers, two gateways and one NATS; no more", async () => {
      const objects = await render();
      const deployments = objects.filter(({ kind }) => kind === "Deployment").map(({ metadata }) => metadata.name);
      expect(deployments.toSorted()).toEqual(["muster-controller", "muster-gateway", "muster-nats"]);
      expect(deploymentOf(objects, "muster-controller").replicas).toBe(2);
      expect(deploymentOf(objects, "muster-gateway").replicas).toBe(2);
      for (const kind of ["ServiceMonitor", "PrometheusRule"]) expect(has(objects, kind)).toBe(false);
      expect(has(objects, "ConfigMap", "muster-dashboard")).toBe(false);
      const leader = find(objects, "Service", "muster-leader").spec;
      expect(leader).not.toHaveProperty("selector");
      expect(leader).toMatchObject({ clusterIP: "None", ports: [{ port: 7441 }, { port: 7442 }] });
    });

    test("flags add what they say", async () => {
      const objects = await render(EVERYTHING);
      for (const [kind, name] of [
        ["Deployment", "muster-redis"],
        ["ServiceMonitor", "muster"],
        ["PrometheusRule", "muster"],
        ["ConfigMap", "muster-dashboard"],
      ] as const)
        expect(has(objects, kind, name), `${kind} ${name}`).toBe(true);
      expect(find(objects, "PrometheusRule", "muster").spec).toEqual(
        parse(readFileSync(join(CHART, "files/alerts.yaml"), "utf8")),
      );
      for (const namespace of [RELEASE_NAMESPACE, "team-a", "team-b"]) {
        find(objects, "ServiceAccount", "muster-worker", namespace);
        find(objects, "RoleBinding", "muster-controller-workloads", namespace);
        find(objects, "NetworkPolicy", "muster-workers", namespace);
      }
      expect(deploymentOf(objects, "muster-controller").pod).toMatchObject({
        nodeSelector: { pool: "cpu" },
        tolerations: [{ operator: "Exists" }],
        imagePullSecrets: [{ name: "registry" }],
      });
    });

    test("programs know every flag that they are given", async () => {
      for (const values of [BED, SETS.namespaced]) {
        const objects = await render(values);
        for (const name of ["controller", "gateway"]) {
          const known = flagsOf(name);
          const { container } = deploymentOf(objects, `muster-${name}`);
          const more = name === "controller" && values === BED ? 2 : 0; // the last two are made up
          const flags = container.args.slice(1, container.args.length - more).filter((word) => word.startsWith("--"));
          expect(flags.length).toBeGreaterThan(5);
          expect(flags.filter((flag) => !known.has(flag))).toEqual([]);
        }
      }
    });

    test("a bed can say where pods listen, what images run and how workers start", async () => {
      const objects = await render(BED);
      const { replicas, container: controller } = deploymentOf(objects, "muster-controller");
      expect(replicas).toBe(3);
      expect(controller.image).toBe("muster/control:test");
      expect(controller.command).toEqual([]);
      expect(controller.args[0]).toBe("controller");
      expect(controller.args.slice(-2)).toEqual(["--more", "1"]);
      expect(controller.env).toContainEqual({ name: "A", value: "b" });
      expect(flagOf(controller, "worker-image")).toBe(`muster/worker@${DIGEST}`);
      for (const [flag, port] of [
        ["listen", 7441],
        ["enrol", 7442],
        ["http", 7443],
      ] as const)
        expect(flagOf(controller, flag)).toBe(`$(MUSTER_POD_IP):${port}`);
      expect(flagOf(controller, "advertise")).toBe(`muster-leader.${RELEASE_NAMESPACE}.svc`);
      expect(flagOf(controller, "gang-timeout")).toBe("30");
      expect(flagOf(controller, "nats-url")).toBe(`tls://muster-nats.${RELEASE_NAMESPACE}.svc:4222`);
      const { container: gateway } = deploymentOf(objects, "muster-gateway");
      expect(flagOf(gateway, "http")).toBe("$(MUSTER_POD_IP):8080");
      expect(flagOf(gateway, "drain-seconds")).toBe("3");
      expect(gateway.args.slice(-2)).toEqual(["--hold-seconds", "9"]);
      const { container: nats } = deploymentOf(objects, "muster-nats");
      expect(flagOf(nats, "addr")).toBe("$(MUSTER_POD_IP)");
      // A variable is expanded in arguments only where it was declared.
      for (const { env } of [controller, gateway, nats]) expect(env.map(({ name }) => name)).toContain("MUSTER_POD_IP");
    });

    test("the worker template is one that the controller reads, with every field that a value may set", async () => {
      const template = {
        imagePullPolicy: "Always",
        command: ["muster"],
        port: 7450,
        listenHost: "$(MUSTER_POD_IP)",
        shmSize: "1Gi",
        resources: { requests: { cpu: 2 }, limits: { memory: "8Gi" } },
        drainSeconds: 7,
        tokenSeconds: 700,
        podCertificates: false,
        userId: 1000,
      };
      const textOf = (objects: Awaited<ReturnType<typeof render>>) => {
        const { data } = find(objects, "ConfigMap", "muster-worker-template");
        return parseTemplate(parse(JSON.stringify(data))["worker-template.yaml"], "image");
      };
      const fixed = { image: "image", serviceAccountName: "muster-worker", caConfigMap: "muster-ca" };
      expect(textOf(await render({ worker: { template } }))).toEqual({ ...template, ...fixed });
      const byDefault = textOf(await render());
      expect(byDefault).toMatchObject({ port: 7440, ...fixed });
      expect(Object.keys(parseTemplate("", "image")).toSorted()).toEqual(Object.keys(byDefault).toSorted());
    });

    test("one namespace watched: its rights are bound there, and only the cluster's room is read everywhere", async () => {
      const objects = await render(SETS.namespaced);
      const bound = objects.filter(({ kind }) => kind === "ClusterRoleBinding").map(({ metadata }) => metadata.name);
      expect(bound).toEqual([`muster:${RELEASE_NAMESPACE}:controller-inventory`]);
      for (const name of ["muster-controller-kinds", "muster-controller-workloads", "muster-gateway"])
        find(objects, "RoleBinding", name, "team-a");
      for (const name of ["muster-controller", "muster-gateway"])
        expect(flagOf(deploymentOf(objects, name).container, "namespace")).toBe("team-a");
      const workers = objects.filter(({ metadata }) => metadata.name === "muster-worker");
      expect(workers.map(({ metadata }) => metadata.namespace)).toEqual(["team-a"]);
      expect(objects.some(({ metadata }) => metadata.name.includes("tenant"))).toBe(false);
    });

    test("an external NATS and a key of one's own: the chart makes neither", async () => {
      const objects = await render(SETS.external);
      expect(has(objects, "Deployment", "muster-nats")).toBe(false);
      expect(has(objects, "Secret")).toBe(false);
      const { container } = deploymentOf(objects, "muster-controller");
      expect(flagOf(container, "nats-url")).toBe("tls://nats.example:4333");
      expect(container.env).toContainEqual({
        name: "MUSTER_NATS_TOKEN",
        valueFrom: { secretKeyRef: { name: "nats", key: "token" } },
      });
      const { container: gateway } = deploymentOf(objects, "muster-gateway");
      expect(gateway.env).toContainEqual({
        name: "MUSTER_API_KEY",
        valueFrom: { secretKeyRef: { name: "key", key: "key" } },
      });
    });

    test("a cluster that is too old is refused with what is needed", async () => {
      expect(await refusal({}, "1.32.9")).toMatch(
        /requires kubeVersion: >=1\.33\.0.*incompatible with Kubernetes v1\.32\.9/,
      );
    });

    test("what needs a Secret says which", async () => {
      expect(await refusal({ redis: { enabled: true } })).toContain(
        'redis.passwordSecret: name the Secret that has the key "password"',
      );
      expect(await refusal({ nats: { externalUrl: "tls://a:1" } })).toContain("nats.externalTokenSecret");
    });

    test("unknown keys are refused wherever they stand, and so are wrong values", async () => {
      const values = parse(readFileSync(join(CHART, "values.yaml"), "utf8"));
      const { spoilt, places } = spoil(values);
      const said = await refusal(spoilt);
      expect(places.length).toBeGreaterThan(20);
      for (const place of places) expect(said).toContain(place);
      expect(said.match(/additional properties 'strange' not allowed/g)?.length).toBe(places.length);
      for (const [wrong, told] of [
        [{ image: { digest: "latest" } }, "/image/digest"],
        [{ gateway: { replicas: -1 } }, "/gateway/replicas"],
        [{ controller: { gangTimeoutSeconds: 5 } }, "/controller/gangTimeoutSeconds"],
        [{ nats: { externalUrl: "http://x" } }, "/nats/externalUrl"],
        [{ worker: { template: { serviceAccountName: "admin" } } }, "/worker/template"],
      ] as const)
        expect(await refusal(wrong)).toContain(told);
    });
  },
);

/** Flags that a command of `muster` knows. */
function flagsOf(command: string): Set<string> {
  const main = join(CHART, "../../controller/cli/main.ts");
  const help = execFileSync(process.execPath, [main, command, "--help"], { encoding: "utf8" });
  return new Set(help.match(/(?<=^ +)--[a-z-]+/gm));
}

/** Maps whose keys are the user's, and what another chart's author fills. */
const FREE = /(^\/admissionPolicy|nodeSelector|podAnnotations|annotations|labels|requests|limits)$/;

/** The values with a key that nobody knows in every map that is not free. */
function spoil(values: unknown, place = ""): { spoilt: Record<string, unknown>; places: string[] } {
  const spoilt: Record<string, unknown> = { strange: true };
  const places = [place === "" ? "at ''" : `at '${place}'`];
  if (typeof values !== "object" || values === null) throw new Error(`${place} is no map`);
  for (const [key, value] of Object.entries(values)) {
    const inner = `${place}/${key}`;
    if (typeof value !== "object" || value === null || Array.isArray(value) || FREE.test(inner)) continue;
    const below = spoil(value, inner);
    spoilt[key] = below.spoilt;
    places.push(...below.places);
  }
  return { spoilt, places };
}
