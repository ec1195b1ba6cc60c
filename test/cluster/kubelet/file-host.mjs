// A file server inside a bed's network space: `node file-host.mjs PORT FOLDER [TOKEN]`. Serves a folder with ranges and the
// content's sha256 as etag; where a token is given nothing is served without it. Weights stop half-way until GET /release:
// whoever pulls is then seen pulling, however fast the machine is. After GET /pace?bytes=N they come at N bytes per second instead.
import { createHash } from "node:crypto";
import { readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { basename, join } from "node:path";

const [port, folder, token] = process.argv.slice(2);
const HELD = /\.(safetensors|gguf)$/;
const HELD_BYTES_MIN = 1024 * 1024; // headers are never held
const known = new Map();
const held = new Set();
const asked = [];
let isReleased = false;
let pace = 0;
const SLICES_PER_SECOND = 20;

/** Weights as a slow network brings them. */
function trickle(response, body) {
  const slice = Math.ceil(pace / SLICES_PER_SECOND);
  let sent = 0;
  const timer = setInterval(() => {
    response.write(body.subarray(sent, sent + slice));
    sent += slice;
    if (sent < body.length) return;
    clearInterval(timer);
    response.end();
  }, 1_000 / SLICES_PER_SECOND);
  response.on("close", () => clearInterval(timer));
}

function fileOf(path) {
  const name = basename(path);
  if (known.has(name)) return known.get(name);
  const at = join(folder, name);
  if (statSync(at, { throwIfNoEntry: false })?.isFile() !== true) return undefined;
  const bytes = readFileSync(at);
  const file = { name, bytes, etag: createHash("sha256").update(bytes).digest("hex") };
  known.set(name, file);
  return file;
}

createServer((request, response) => {
  const { pathname: path, searchParams } = new URL(request.url ?? "/", "http://host");
  if (path === "/release") {
    isReleased = true;
    for (const go of held) go();
    return response.end();
  }
  if (path === "/hold") {
    isReleased = false;
    asked.length = 0;
    return response.end();
  }
  if (path === "/pace") {
    pace = Number(searchParams.get("bytes"));
    return response.end();
  }
  if (path === "/asked") return response.end(JSON.stringify(asked));
  asked.push({
    path,
    range: request.headers.range ?? "",
    isKnown: request.headers.authorization === `Bearer ${token}`,
  });
  if (token !== undefined && request.headers.authorization !== `Bearer ${token}`) return response.writeHead(401).end();
  const file = fileOf(path);
  if (file === undefined) return response.writeHead(404).end();
  const { name, bytes, etag } = file;
  const [, from, to] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "") ?? [];
  const begin = Number(from ?? 0);
  const end = to ? Math.min(Number(to) + 1, bytes.length) : bytes.length;
  const body = bytes.subarray(begin, end);
  response.writeHead(from === undefined ? 200 : 206, {
    etag: `"${etag}"`,
    "content-length": String(body.length),
    ...(from === undefined ? {} : { "content-range": `bytes ${begin}-${end - 1}/${bytes.length}` }),
  });
  if (isReleased || !HELD.test(name) || body.length < HELD_BYTES_MIN) return response.end(body);
  if (pace > 0) return trickle(response, body);
  const half = Math.floor(body.length / 2);
  response.write(body.subarray(0, half));
  const go = () => {
    held.delete(go);
    response.end(body.subarray(half));
  };
  held.add(go);
  response.on("close", () => held.delete(go));
}).listen(Number(port), "127.0.0.1");
