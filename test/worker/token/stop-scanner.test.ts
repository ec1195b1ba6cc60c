import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { StopScanner } from "../../../worker/token/stop-scanner.ts";

/** The rule in plain words: at the first character that completes a stop string, the longest one that ends there. */
function expected(text: string, stops: readonly string[]): { text: string; stop: string | undefined } {
  for (let end = 1; end <= text.length; end++) {
    const ending = stops.filter((stop) => text.slice(0, end).endsWith(stop)).sort((a, b) => b.length - a.length)[0];
    if (ending !== undefined) return { text: text.slice(0, end - ending.length), stop: ending };
  }
  return { text, stop: undefined };
}

function scan(pieces: readonly string[], stops: readonly string[]) {
  const scanner = new StopScanner(stops);
  let text = "";
  let seen = "";
  for (const piece of pieces) {
    const found = scanner.push(piece);
    seen += piece;
    text += found.text;
    if (found.stop !== undefined) return { text, stop: found.stop };
    // T3: what is held is a proper prefix of a stop string, and nothing longer is.
    const held = seen.slice(text.length);
    if (held !== "") expect(stops.some((stop) => stop.length > held.length && stop.startsWith(held))).toBe(true);
    for (let more = held.length + 1; more <= seen.length; more++) {
      const suffix = seen.slice(seen.length - more);
      expect(stops.some((stop) => stop.length > more && stop.startsWith(suffix))).toBe(false);
    }
  }
  return { text: text + scanner.end(), stop: undefined };
}

const letters = fc.constantFrom("a", "b", "c", "é", "\u{1F600}");
const string = (max: number) => fc.array(letters, { minLength: 1, maxLength: max }).map((parts) => parts.join(""));

describe("stop scanner", () => {
  test("T1, T2, T3: any text in any pieces is cut at the same place", () => {
    fc.assert(
      fc.property(fc.array(string(4), { maxLength: 12 }), fc.array(string(5), { maxLength: 4 }), (pieces, stops) => {
        expect(scan(pieces, stops)).toEqual(expected(pieces.join(""), stops));
      }),
      { numRuns: 2_000 },
    );
  });

  test("a stop string is found across pieces, and the text before it is sent", () => {
    expect(scan(["Hel", "lo wor", "ld\n", "\nUs", "er: x"], ["\n\nUser:"])).toEqual({
      text: "Hello world",
      stop: "\n\nUser:",
    });
  });

  test("held text is sent when it turns out not to be a stop string", () => {
    const scanner = new StopScanner(["END"]);
    expect(scanner.push("the EN").text).toBe("the ");
    expect(scanner.push("EN").text).toBe("EN");
    expect(scanner.push("x").text).toBe("ENx");
  });
});
