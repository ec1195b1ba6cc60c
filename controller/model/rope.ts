// Rotary base frequencies: computed once, here, in f64, given to the ranks as f32. Formulas: the scaling rules that
// configurations name (`rope_parameters`, or `rope_scaling` beside `rope_theta`).
import { type RopeSpec, RopeSpec_Layout } from "../../proto/gen/muster/v1/plan.ts";
import type { Keys } from "./keys.ts";
import { unsupported } from "./reject.ts";

export type RopeScaling =
  | { kind: "none" }
  | { kind: "linear"; factor: number }
  | { kind: "llama3"; factor: number; lowFactor: number; highFactor: number; originalTokens: number };

export type RopeRule = { theta: number; scaling: RopeScaling };

const THETA = { min: 1, max: 1e12 };
const FACTOR = { min: 1e-6, max: 1e6 };

/** What a Hugging Face configuration says, in either spelling. */
export function ropeRule(config: Keys, thetaDefault: number): RopeRule {
  const keys = config.child("rope_parameters") ?? config.child("rope_scaling");
  const theta = keys?.has("rope_theta")
    ? keys.number("rope_theta", THETA)
    : config.number("rope_theta", THETA, thetaDefault);
  return { theta, scaling: keys ? scalingOf(keys) : { kind: "none" } };
}

function scalingOf(keys: Keys): RopeScaling {
  const name = keys.has("rope_type") ? "rope_type" : "type";
  const kind = keys.text(name, "default");
  switch (kind) {
    case "default":
      return { kind: "none" };
    case "linear":
      return { kind, factor: keys.number("factor", FACTOR) };
    case "llama3":
      return {
        kind,
        factor: keys.number("factor", FACTOR),
        lowFactor: keys.number("low_freq_factor", FACTOR),
        highFactor: keys.number("high_freq_factor", FACTOR),
        originalTokens: keys.number("original_max_position_embeddings", { min: 1, max: 1e9 }),
      };
    default:
      return keys.unsupported(name, `rope scaling "${kind}" is not supported; default, linear and llama3 are`);
  }
}

/** One frequency for each rotated pair, `dims / 2` of them. */
export function frequencies(dims: number, rule: RopeRule): number[] {
  return Array.from({ length: dims / 2 }, (_, j) => Math.fround(scaled(rule.theta ** ((-2 * j) / dims), rule.scaling)));
}

/** What a GGUF file says; `ropeFactors` are the values of rope_freqs.weight, where it has them. */
export function ggufRope(keys: Keys, dims: number, ropeFactors: number[] | undefined): RopeSpec {
  if (dims % 2 !== 0) keys.reject("rope.dimension_count", `must be even, is ${dims}`);
  const theta = keys.number("rope.freq_base", { min: 1, max: 1e12 }, 10_000);
  const type = keys.text("rope.scaling.type", "none");
  if (type !== "none" && type !== "linear")
    keys.unsupported("rope.scaling.type", `rope scaling "${type}" is not supported; none and linear are`);
  // Old files write the factor of linear scaling under a key of its own.
  const old = keys.number("rope.scale_linear", FACTOR, 1);
  const factor = type === "linear" ? keys.number("rope.scaling.factor", FACTOR, old) : old;
  if (ropeFactors && ropeFactors.length !== dims / 2)
    unsupported(`${keys.file}/rope_freqs.weight`, `has ${ropeFactors.length} values, ${dims / 2} are needed`);
  const divisors = Array.from({ length: dims / 2 }, (_, j) => (ropeFactors?.[j] ?? 1) * factor);
  const frequencies = divisors.map((divisor, j) => Math.fround(theta ** ((-2 * j) / dims) / divisor));
  return { layout: RopeSpec_Layout.INTERLEAVED, dims, theta, frequencies };
}

function scaled(frequency: number, scaling: RopeScaling): number {
  switch (scaling.kind) {
    case "none":
      return frequency;
    case "linear":
      return frequency / scaling.factor;
    case "llama3": {
      const { factor, lowFactor, highFactor, originalTokens } = scaling;
      const wavelength = (2 * Math.PI) / frequency;
      if (wavelength < originalTokens / highFactor) return frequency;
      // The second test also keeps equal factors (an empty middle band) from 0 / 0.
      if (wavelength > originalTokens / lowFactor || highFactor === lowFactor) return frequency / factor;
      const smooth = (originalTokens / wavelength - lowFactor) / (highFactor - lowFactor);
      return ((1 - smooth) * frequency) / factor + smooth * frequency;
    }
  }
}
