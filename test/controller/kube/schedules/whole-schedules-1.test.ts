// Half of the seeded schedules of a whole cluster; see whole-shard.ts.
import { shard } from "./whole-shard.ts";

shard(0, 2);
