// A real HTTP server on loopback that serves files well or badly, as each test asks.
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { afterAll } from "vitest";

export type Served = { bytes: Buffer; etag?: string };
export type Seen = {
  path: string;
  range: string | undefined;
  ifRange: string | undefined;
  authorization: string | undefined;
};
export type Manners = {
  ranges: boolean;
  /** The connection is cut after so many body bytes, `drops` times. */
  dropAfter: number;
  drops: number;
  /** Answers instead of the file, once for each item. */
  statuses: number[];
  /** Wrong lengths and the like: changes the headers of a good answer. */
  headers: Record<string, string>;
  redirects: Record<string, string>;
  /** Refused without this Authorization. */
  needs: string | undefined;
};

const POLITE: Manners = {
  ranges: true,
  dropAfter: 0,
  drops: 0,
  statuses: [],
  headers: {},
  redirects: {},
  needs: undefined,
};

export class FileServer {
  readonly files = new Map<string, Served>();
  readonly seen: Seen[] = [];
  manners: Manners = { ...POLITE };
  url = "";
  readonly #server = createServer((request, response) => this.#answer(request, response));

  static async start(): Promise<FileServer> {
    const server = new FileServer();
    await new Promise<void>((done) => server.#server.listen(0, "127.0.0.1", done));
    const address = server.#server.address();
    if (address === null || typeof address === "string") throw new Error("the server has no port");
    server.url = `http://127.0.0.1:${address.port}`;
    afterAll(() => {
      server.#server.closeAllConnections();
      server.#server.close();
    });
    return server;
  }

  serve(path: string, bytes: Buffer, etag?: string): void {
    this.files.set(path, etag === undefined ? { bytes } : { bytes, etag });
  }

  behave(manners: Partial<Manners> = {}): void {
    this.manners = { ...POLITE, ...manners };
    this.seen.length = 0;
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const path = (request.url ?? "").split("?")[0] ?? "";
    const { range, authorization } = request.headers;
    const condition = request.headers["if-range"];
    const ifRange = Array.isArray(condition) ? condition[0] : condition;
    this.seen.push({ path, range, ifRange, authorization });
    const end = (status: number, headers: Record<string, string> = {}) => response.writeHead(status, headers).end();
    const status = this.manners.statuses.shift();
    if (status) return void end(status);
    const target = this.manners.redirects[path];
    if (target) return void end(302, { location: target, "x-repo-commit": "c0ffee", ...this.manners.headers });
    if (this.manners.needs && authorization !== this.manners.needs) return void end(401);
    const file = this.files.get(path);
    if (!file) return void end(404);
    this.#send(file, { range, ifRange }, response);
  }

  #send(
    file: Served,
    asked: { range: string | undefined; ifRange: string | undefined },
    response: ServerResponse,
  ): void {
    const { bytes, etag } = file;
    const headers: Record<string, string> = etag ? { etag } : {};
    const match = /^bytes=(\d+)-(\d*)$/.exec(asked.range ?? "");
    const isStale = asked.ifRange !== undefined && asked.ifRange !== etag;
    let body = bytes;
    if (this.manners.ranges && match && !isStale) {
      const begin = Number(match[1]);
      const end = Math.min(match[2] ? Number(match[2]) + 1 : bytes.length, bytes.length);
      if (begin >= bytes.length) return void response.writeHead(416).end();
      body = bytes.subarray(begin, end);
      headers["content-range"] = `bytes ${begin}-${end - 1}/${bytes.length}`;
    }
    const status = headers["content-range"] ? 206 : 200;
    response.writeHead(status, { ...headers, "content-length": String(body.length), ...this.manners.headers });
    if (this.manners.drops > 0 && body.length > this.manners.dropAfter) {
      this.manners.drops--;
      response.write(body.subarray(0, this.manners.dropAfter), () => setTimeout(() => response.destroy(), 20));
    } else response.end(body);
  }
}
