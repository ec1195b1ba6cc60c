import fc from "fast-check";
import { expect, test } from "vitest";
import { findRooms, type Within } from "../../../../controller/kube/gangs/rooms.ts";
import { canSeat } from "./can-seat.ts";

test("a seat is found wherever brute force finds one", () => {
  const rooms = fc.array(
    fc.record({
      free: fc.nat({ max: 8 }),
      domain: fc.constantFrom("c1", "c2"),
      zone: fc.constantFrom("z1", "z2", undefined),
    }),
    { maxLength: 5 },
  );
  const demands = fc.array(fc.integer({ min: 1, max: 8 }), { minLength: 1, maxLength: 3 });
  fc.assert(
    fc.property(rooms, demands, fc.constantFrom<Within>("any", "zone", "nvlink"), (list, devices, within) => {
      const named = list.map((room, index) => ({ name: `n${index}`, ...room }));
      const found = findRooms(devices, named, within);
      expect(found !== undefined).toBe(canSeat(devices, named, within));
      if (found === undefined) return;
      const chosen = found.map((name) => named.filter((room) => room.name === name));
      expect(canSeat(devices, chosen.flat(), within)).toBe(true);
      expect(chosen.every(([room], worker) => (room?.free ?? 0) >= (devices[worker] ?? 0))).toBe(true);
    }),
    { numRuns: 3000 },
  );
});
