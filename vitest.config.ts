import { configDefaults, defineConfig } from "vitest/config";

/** Against a real Kubernetes control plane: minutes of Go compiling, root and namespaces. test/run.mjs runs them after the others. */
const CLUSTER = [
  "test/bench/cluster-world.test.ts",
  "test/cluster/controlplane.test.ts",
  "test/cluster/kubelet.test.ts",
  "test/cluster/kubelet/**/*.test.ts",
  "test/controller/kube/api/real-server.test.ts",
];
const isCluster = process.env.MUSTER_TEST_CLUSTER === "1";

// Two workers: tests start real processes and the machine is small. Bounds are generous; waits inside tests are not sleeps.
export default defineConfig({
  test: {
    include: isCluster ? CLUSTER : ["test/**/*.test.ts"],
    exclude: [...configDefaults.exclude, ...(isCluster ? [] : CLUSTER)],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    maxWorkers: 2,
    pool: "forks",
    reporters: ["default"],
  },
});
