// The other oracle: llama.cpp. Reads {"texts": [...]} or {"walk": [{"ids": [...], "from": n}, ...], "speed": n, "runs": n} on standard input.
//   texts  prints the ids of each text, special tokens understood, nothing added
//   walk   evaluates all ids (teacher-forced) and prints its greedy choice after every position >= from - 1, and the tokens/s
//          of `speed` greedy tokens after the first prompt, best of `runs`
// Run by smollm2-check.ts as: node llama-cpp.mjs MODEL FOLDER_OF_NODE_LLAMA_CPP THREADS
import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { pathToFileURL } from "node:url";

const [modelPath, folder, threads] = process.argv.slice(2);
const entry = createRequire(join(folder, "package.json")).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry).href);
const request = JSON.parse(await text(process.stdin));

const llama = await getLlama({
  gpu: false,
  build: "never",
  logLevel: LlamaLogLevel.error,
  maxThreads: Number(threads),
});
const model = await llama.loadModel({ modelPath });

async function walk(sequence, { ids, from }) {
  await sequence.clearHistory();
  const items = ids.map((id, index) => (index >= from - 1 ? [id, { generateNext: { token: true } }] : id));
  const answers = await sequence.controlledEvaluate(items);
  return answers.slice(from - 1).map((answer) => answer?.next?.token ?? -1);
}

async function speed(sequence, prompt, count) {
  await sequence.clearHistory();
  let done = 0;
  let started = 0;
  for await (const _ of sequence.evaluate(prompt, { temperature: 0 })) {
    if (done === 0) started = performance.now();
    if (done++ === count) break;
  }
  return (count * 1000) / (performance.now() - started);
}

if (request.texts) {
  console.log(JSON.stringify(request.texts.map((one) => model.tokenize(one, true, "trimLeadingSpace"))));
} else {
  const context = await model.createContext({ contextSize: 1024, threads: Number(threads) });
  const sequence = context.getSequence();
  const best = [];
  for (const one of request.walk) best.push(await walk(sequence, one));
  const [first] = request.walk;
  const speeds = [];
  while (speeds.length < request.runs)
    speeds.push(await speed(sequence, first.ids.slice(0, first.from), request.speed));
  const tokensPerSecond = Math.max(...speeds);
  console.log(JSON.stringify({ best, tokensPerSecond }));
}
await llama.dispose();
