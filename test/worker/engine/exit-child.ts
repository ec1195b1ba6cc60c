// A process that opens an engine and leaves it in the way its argument says; run by exit.test.ts.
import { Driver, opening, openPlaced, readPlaced, rowOf } from "./open.ts";

const [how] = process.argv.slice(2);
const model = await readPlaced("test/models/nano-draft/");
const driver = new Driver(await openPlaced(model, { ranks: 2 }));
const ids = Array.from({ length: 100 }, (_, i) => i);
const running = driver.run([opening(1, ids)], [rowOf(1, ids.length)]);
if (how === "exit") process.exit(0);
await running;
process.stdout.write("idle");
