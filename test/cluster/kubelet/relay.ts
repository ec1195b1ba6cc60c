// The way out of a network space for one port: what is dialled inside reaches a listener of the bed's makers by its file, which
// is reached from any network namespace. The counterpart of controlplane/door.ts; owns no policy.
//
//   node relay.ts PORT SOCKET        says "open" once it listens on 127.0.0.1:PORT; ends when its standard input does
import { connect, createServer } from "node:net";

const [port, path] = process.argv.slice(2);
if (!port || !path) throw new Error("usage: relay.ts PORT SOCKET");

// Half-open on neither side: where one end is gone, as by kill -9, the other learns it at once.
const server = createServer({ noDelay: true }, (near) => {
  const far = connect({ path });
  near.on("error", () => far.destroy());
  far.on("error", () => near.destroy());
  near.on("close", () => far.destroy());
  far.on("close", () => near.destroy());
  near.pipe(far);
  far.pipe(near);
});

server.listen(Number(port), "127.0.0.1", () => process.stdout.write("open\n"));
process.stdin.resume();
process.stdin.on("close", () => process.exit(0));
