// The door: the one process that holds a network namespace open and lets its makers dial into it. Runs inside the namespace.
// A caller connects to the unix socket (a file, so it is reached from any network namespace), sends "ADDRESS PORT\n", hears
// "+\n" or "-why\n", and from then on the two sides are joined. Owns no policy: whoever can open the socket may dial.
//
//   node door.ts SOCKET        says "open" on standard output once it listens; ends when its standard input does
import { connect, createServer, type Socket } from "node:net";

const REQUEST_BYTES_MAX = 64; // an address and a port
const DIAL_TIMEOUT_MS = 10_000;

const path = process.argv[2];
if (!path) throw new Error("usage: door.ts SOCKET");

const server = createServer({ allowHalfOpen: true }, (caller) => {
  caller.on("error", () => caller.destroy());
  let asked = Buffer.alloc(0);
  const hear = (chunk: Buffer) => {
    asked = Buffer.concat([asked, chunk]);
    const end = asked.indexOf("\n");
    if (end < 0 && asked.length <= REQUEST_BYTES_MAX) return;
    caller.off("data", hear);
    caller.pause();
    const [address = "", port = ""] = asked.subarray(0, end).toString().split(" ");
    if (end >= 0) join(caller, { address, port: Number(port), first: asked.subarray(end + 1) });
    else caller.destroy();
  };
  caller.on("data", hear);
});

function join(caller: Socket, target: { address: string; port: number; first: Buffer }): void {
  const far = connect({ host: target.address, port: target.port, allowHalfOpen: true, noDelay: true });
  const refuse = (why: string) => caller.end(`-${why}\n`);
  far.setTimeout(DIAL_TIMEOUT_MS, () => far.destroy(new Error("timed out")));
  const failed = (error: Error) => refuse(error.message);
  far.once("error", failed);
  far.once("connect", () => {
    far.setTimeout(0);
    far.off("error", failed);
    far.on("error", () => caller.destroy());
    far.on("close", () => caller.destroySoon());
    caller.on("close", () => far.destroySoon());
    caller.write("+\n");
    if (target.first.length > 0) far.write(target.first);
    caller.pipe(far);
    far.pipe(caller);
  });
  caller.once("close", () => far.destroy());
}

server.listen(path, () => process.stdout.write("open\n"));
process.stdin.resume();
process.stdin.on("close", () => process.exit(0));
