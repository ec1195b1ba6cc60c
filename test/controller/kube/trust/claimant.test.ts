import { describe, expect, test } from "vitest";
import { LABELS } from "../../../../controller/api/meta.ts";
import type { KubeObject } from "../../../../controller/kube/api/client.ts";
import { claimantOf } from "../../../../controller/kube/trust/claimant.ts";
import { Store } from "../../../../controller/kube/watch/store.ts";
import { gatewayRunning, groupAt, RELEASE, storesNow, workerRunning } from "./term.ts";

const accounts = { namespace: RELEASE, gateway: "muster-gateway" };
type Pod = KubeObject & { spec: { serviceAccountName: string } };
const claimsOf = ({ metadata, spec }: Pod) => ({
  namespace: metadata.namespace ?? "",
  pod: { name: metadata.name, uid: metadata.uid ?? "" },
  account: spec.serviceAccountName,
});

function bed(pod: Pod, group: KubeObject = groupAt("chat-0", 3)) {
  const stores = storesNow();
  stores.groups.put(group);
  stores.pods.put(pod);
  return { stores, claim: (claims = claimsOf(pod)) => claimantOf(claims, stores, accounts) };
}

const inspecting = (changes: Partial<KubeObject["metadata"]> = {}): Pod => ({
  apiVersion: "v1",
  kind: "Pod",
  metadata: {
    name: "chat-inspect-1a2b",
    namespace: "models",
    uid: "uid-inspect",
    resourceVersion: "10",
    labels: { "app.kubernetes.io/component": "inspect", [LABELS.deployment]: "chat" },
    ownerReferences: [{ apiVersion: "muster.dev/v1alpha1", kind: "ModelDeployment", name: "chat", uid: "uid-chat" }],
    ...changes,
  },
  spec: { serviceAccountName: "muster-worker" },
  status: { phase: "Running", podIP: "10.244.1.9" },
});

describe("who a pod is", () => {
  test("C2: a worker by its labels and its group, with its headless name", () => {
    expect(bed(workerRunning()).claim()).toEqual({
      kind: "known",
      identity: { role: "worker", namespace: "models", name: "chat-0", podUid: "uid-chat-0-3-1" },
      dns: ["chat-0-3-1.chat-0.models", "chat-0-3-1.chat-0.models.svc", "chat-0-3-1.chat-0.models.svc.cluster.local"],
    });
  });

  test("C4: a gateway by its account in the release's namespace, and nowhere else", () => {
    expect(bed(gatewayRunning()).claim()).toMatchObject({
      kind: "known",
      identity: { role: "gateway", namespace: RELEASE, name: "muster-gateway-7f", podUid: "uid-gateway" },
    });
    expect(bed(gatewayRunning("models")).claim()).toMatchObject({ kind: "refused" });
    expect(bed(gatewayRunning(RELEASE, "default")).claim()).toMatchObject({ kind: "refused" });
  });

  test("C3: a pod that inspects, while its owner is there", () => {
    const { stores, claim } = bed(inspecting());
    expect(claim()).toMatchObject({ kind: "refused" });
    stores.deployments.put({
      apiVersion: "muster.dev/v1alpha1",
      kind: "ModelDeployment",
      metadata: { name: "chat", namespace: "models", uid: "uid-chat", resourceVersion: "10" },
    });
    expect(claim()).toMatchObject({ kind: "known", identity: { role: "inspect", name: "chat-inspect-1a2b" } });
    const stranger = bed(inspecting({ ownerReferences: [] }));
    stranger.stores.deployments.put({
      apiVersion: "a",
      kind: "b",
      metadata: { name: "chat", namespace: "models", uid: "uid-chat" },
    });
    expect(stranger.claim()).toMatchObject({ kind: "refused" });
  });

  test("C1: another UID, another account, a pod that has ended are refused", () => {
    const pod = workerRunning();
    const { stores, claim } = bed(pod);
    const claims = claimsOf(pod);
    expect(claim({ ...claims, pod: { ...claims.pod, uid: "uid-before" } })).toMatchObject({ kind: "refused" });
    expect(claim({ ...claims, account: "default" })).toMatchObject({ kind: "refused" });
    for (const phase of ["Failed", "Succeeded"]) {
      stores.pods.replace([], "20");
      const metadata = { ...pod.metadata, resourceVersion: "30" };
      stores.pods.replace([{ ...pod, metadata, status: { phase, podIP: "10.244.1.5" } }], "30");
      expect(claim()).toMatchObject({ kind: "refused", detail: expect.stringContaining("has ended") });
    }
  });

  test("C2: labels without the owner, of no group, or of an older incarnation are refused", () => {
    const pod = workerRunning();
    const unowned = { ...pod, metadata: { ...pod.metadata, ownerReferences: [] } };
    expect(bed(unowned).claim()).toMatchObject({ kind: "refused", detail: expect.stringContaining("not owned") });
    expect(bed(pod, groupAt("chat-1", 3)).claim()).toMatchObject({ kind: "refused" });
    const anew = groupAt("chat-0", 3);
    const other = { ...anew, metadata: { ...anew.metadata, uid: "uid-of-a-later-group" } };
    expect(bed(pod, other).claim()).toMatchObject({ kind: "refused" });
    expect(bed(pod, groupAt("chat-0", 4)).claim()).toMatchObject({
      kind: "refused",
      detail: expect.stringContaining("incarnation 3; its group is at 4"),
    });
    expect(bed(pod, groupAt("chat-0", 2)).claim()).toMatchObject({ kind: "known" }); // our own record is behind
    const plain = { ...pod, metadata: { ...pod.metadata, labels: {} } };
    expect(bed(plain).claim()).toMatchObject({ kind: "refused", detail: expect.stringContaining("neither") });
  });

  test("what the watch has not brought yet is too early, not refused", () => {
    const pod = workerRunning();
    const { stores, claim } = bed(workerRunning());
    stores.pods.replace([], "20");
    expect(claim()).toMatchObject({ kind: "early" });
    expect(claimantOf(claimsOf(pod), { ...stores, groups: new Store() }, accounts)).toMatchObject({ kind: "early" });
  });
});
