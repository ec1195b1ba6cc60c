// The program of test pods: an HTTP server that says where it runs and does what it is asked, and gRPC health on another port.
//   GET /            {pid, hostname, env, args}          GET /file?path=          a file as it sees it
//   GET /get?url=    the body of another pod's answer    GET /whoami              its service account, by its mounted token
//   GET /health      200, or 503 after GET /sicken       GET /exit?code=          ends
// PORT and GRPC_PORT name the ports; it listens on POD_IP alone. SIGTERM ends it, or is ignored where STUBBORN=1.
import { readFileSync } from "node:fs";
import { createServer, get } from "node:http";
import { request } from "node:https";
import { hostname } from "node:os";
import { Server, ServerCredentials } from "@grpc/grpc-js";
import { HealthImplementation } from "grpc-health-check";

const SECRETS = "/var/run/secrets/kubernetes.io/serviceaccount";
const { PORT = "8080", GRPC_PORT, POD_IP = "127.0.0.1", STUBBORN } = process.env;
let isWell = true;

process.on("SIGTERM", () => {
  process.stdout.write("SIGTERM\n");
  if (STUBBORN !== "1") process.exit(0);
});

/** One GET on a connection of its own. */
const fetched = (url: string) =>
  new Promise<string>((done, fail) => {
    get(url, { timeout: 5_000, agent: false }, (answer) => {
      let body = "";
      answer.on("data", (chunk) => (body += chunk)).on("end", () => done(body));
    }).on("error", fail);
  });

const whoami = () =>
  new Promise<string>((done, fail) => {
    const asked = request(
      {
        host: process.env.KUBERNETES_SERVICE_HOST,
        port: process.env.KUBERNETES_SERVICE_PORT,
        path: "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        method: "POST",
        ca: readFileSync(`${SECRETS}/ca.crt`),
        headers: {
          authorization: `Bearer ${readFileSync(`${SECRETS}/token`, "utf8")}`,
          "content-type": "application/json",
        },
      },
      (answer) => {
        let body = "";
        answer.on("data", (chunk) => (body += chunk)).on("end", () => done(body));
      },
    );
    asked.on("error", fail);
    asked.end(JSON.stringify({ apiVersion: "authentication.k8s.io/v1", kind: "SelfSubjectReview" }));
  });

async function answer(url: URL): Promise<string> {
  const asked = (name: string) => url.searchParams.get(name) ?? "";
  switch (url.pathname) {
    case "/":
      return JSON.stringify({ pid: process.pid, hostname: hostname(), env: process.env, args: process.argv.slice(2) });
    case "/file":
      return readFileSync(asked("path"), "utf8");
    case "/get":
      return await fetched(asked("url"));
    case "/whoami":
      return await whoami();
    case "/sicken":
      isWell = false;
      return "sick";
    case "/exit":
      setImmediate(() => process.exit(Number(asked("code"))));
      return "ending";
    default:
      throw new Error(`no such path: ${url.pathname}`);
  }
}

createServer((question, response) => {
  const url = new URL(question.url ?? "/", "http://pod");
  if (url.pathname === "/health") {
    response.writeHead(isWell ? 200 : 503).end();
    return;
  }
  answer(url).then(
    (body) => response.end(body),
    (error) => response.writeHead(500).end(String(error)),
  );
}).listen(Number(PORT), POD_IP, () => process.stdout.write(`listening on ${POD_IP}:${PORT}\n`));

if (GRPC_PORT) {
  const server = new Server();
  new HealthImplementation({ "": "SERVING", sick: "NOT_SERVING" }).addToServer(server);
  server.bindAsync(`${POD_IP}:${GRPC_PORT}`, ServerCredentials.createInsecure(), (error) => {
    if (error) throw error;
  });
}
