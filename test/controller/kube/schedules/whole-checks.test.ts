// That the checks of the schedules can fail: the same seeds with one thing broken on purpose, below the controller or beside it.
// And that a seed is one history.
import { expect, test } from "vitest";
import type { KubeApi, KubeObject, Resource } from "../../../../controller/kube/api/client.ts";
import { fieldsOf } from "../../../../controller/kube/api/fields.ts";
import { playSchedule } from "./whole-schedule.ts";

const SEEDS_MAX = 20;

/** Of the first seed that finds it. */
async function brokenOf(between: (api: KubeApi) => KubeApi): Promise<string> {
  for (let seed = 1; seed <= SEEDS_MAX; seed++) {
    const { broken } = await playSchedule(seed, { between });
    if (broken.length > 0) return broken.join("\n");
  }
  return "";
}

const withPods = (api: KubeApi, change: (pod: KubeObject) => KubeObject): KubeApi => ({
  serves: (...call) => api.serves(...call),
  get: (...call) => api.get(...call),
  list: (...call) => api.list(...call),
  watch: (...call) => api.watch(...call),
  replace: (...call) => api.replace(...call),
  replaceStatus: (...call) => api.replaceStatus(...call),
  patch: (...call) => api.patch(...call),
  delete: (...call) => api.delete(...call),
  create: (resource: Resource, object, ...rest) =>
    api.create(resource, resource.plural === "pods" ? change(object) : object, ...rest),
});

test("a pod that is created with its gate open is found: it has no seat", async () => {
  const open = (pod: KubeObject): KubeObject => ({ ...pod, spec: { ...fieldsOf(pod.spec), schedulingGates: [] } });
  expect(await brokenOf((api) => withPods(api, open))).toMatch(/J4: .* is open without a seat/);
});

test("a pod that says another plan than its group is found", async () => {
  const other = ({ metadata, ...pod }: KubeObject): KubeObject => ({
    ...pod,
    metadata: { ...metadata, labels: { ...metadata.labels, "muster.dev/plan": "another" } },
  });
  expect(await brokenOf((api) => withPods(api, other))).toMatch(/J5: .* is of plan another/);
});

test("the same seed makes the same history", async () => {
  for (const seed of [3, 4]) {
    const [one, other] = [await playSchedule(seed), await playSchedule(seed)];
    expect(one.bed.server.version).toBe(other.bed.server.version);
    expect([...one.happened]).toEqual([...other.happened]);
    expect(one.bed.time.nowMs()).toBe(other.bed.time.nowMs());
  }
});
