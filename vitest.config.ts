import { defineConfig } from "vitest/config";

// One worker: tests start real processes and the machine is small. Bounds are generous; waits inside tests are not sleeps.
export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    maxWorkers: 2,
    pool: "forks",
    reporters: ["default"],
  },
});
