// What of the controller uses trust: its links to workers, and what worker pods are told.
import { expect, onTestFinished, test } from "vitest";
import { fieldsOf, listOf } from "../../../../controller/kube/api/fields.ts";
import { workerPod } from "../../../../controller/kube/groups/pods.ts";
import { GrpcWorkerLinks } from "../../../../controller/kube/workers/worker-link.ts";
import { authorityNow, controller, serve, trustOf, workerOf } from "../../../proto/mutual-bed.ts";
import { identity, TEMPLATE } from "../groups/groups.ts";

const { signal } = new AbortController();

test("N3: the controller talks to the worker of that pod, namespace and group alone", async () => {
  const authority = await authorityNow();
  const address = await serve((await trustOf(authority, workerOf("chat-0", "uid-1"))).server(["controller"]));
  const links = new GrpcWorkerLinks({ trust: await trustOf(authority, controller), onNews: () => {} });
  onTestFinished(() => links.close());
  const describe = (group: string, uid: string) =>
    links.describe({ name: { group, incarnation: 1n, worker: 0 }, uid, address }, signal);
  expect(await describe("models/chat-0", "uid-1")).toMatchObject({ kind: "answered" });
  for (const [group, uid] of [
    ["models/chat-0", "uid-2"],
    ["models/chat-1", "uid-1"],
    ["others/chat-0", "uid-1"],
  ] as const) {
    links.forget("uid-1");
    expect(await describe(group, uid)).toMatchObject({ kind: "silent", detail: expect.stringContaining("refused") });
  }
});

test("a worker pod is told where its certificate comes from, with token and bundle in its folder", () => {
  const enrol = "muster-leader.muster.svc:7442";
  const argsOf = (pod: ReturnType<typeof workerPod>) => listOf(fieldsOf(listOf(fieldsOf(pod.spec).containers)[0]).args);
  const pod = workerPod(identity(), { ...TEMPLATE, enrol });
  expect(argsOf(pod)).toEqual([
    ...argsOf(workerPod(identity(), TEMPLATE)),
    "--identity",
    "/var/run/muster",
    "--enrol",
    enrol,
  ]);
  const folder = listOf(fieldsOf(pod.spec).volumes)
    .map(fieldsOf)
    .find(({ name }) => name === "identity");
  expect(folder?.projected).toMatchObject({
    sources: [
      { serviceAccountToken: { audience: "muster", path: "token" } },
      { configMap: { name: "muster-ca", items: [{ key: "ca.crt", path: "ca.crt" }] } },
    ],
  });
});
