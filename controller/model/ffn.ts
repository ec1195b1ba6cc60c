// Feed-forward planes: dense, shared expert, and experts in each of the ways that checkpoints store them.
import { TensorRole } from "../../proto/gen/muster/v1/plan.ts";
import type { TensorTable } from "./tensor-table.ts";

export function denseFfnPlanes(table: TensorTable, [hidden, ffn]: readonly [number, number], block: number): void {
  table.linear(TensorRole.GATE, [ffn, hidden], block);
  table.linear(TensorRole.UP, [ffn, hidden], block);
  table.linear(TensorRole.DOWN, [hidden, ffn], block);
}

export function sharedExpertPlanes(table: TensorTable, [hidden, ffn]: readonly [number, number], block: number): void {
  table.linear(TensorRole.SHARED_GATE, [ffn, hidden], block);
  table.linear(TensorRole.SHARED_UP, [ffn, hidden], block);
  table.linear(TensorRole.SHARED_DOWN, [hidden, ffn], block);
}

export type ExpertShape = { hidden: number; ffn: number; experts: number };

const roles = ({ hidden, ffn }: ExpertShape) =>
  [
    { role: TensorRole.EXPERT_GATE, rows: ffn, cols: hidden },
    { role: TensorRole.EXPERT_UP, rows: ffn, cols: hidden },
    { role: TensorRole.EXPERT_DOWN, rows: hidden, cols: ffn },
  ] as const;

/** One stored tensor for each expert and projection. */
export function separateExpertPlanes(table: TensorTable, shape: ExpertShape, block: number): void {
  for (let expert = 0; expert < shape.experts; expert++)
    for (const plane of roles(shape)) table.plane({ ...plane, block, expert });
}

/** Hugging Face's fused form: gate_up [experts, in, 2 * ffn] and down [experts, ffn, out], both transposed. */
export function fusedExpertPlanes(
  table: TensorTable,
  shape: ExpertShape,
  place: { block: number; path: string },
): void {
  const { hidden, ffn, experts: planes } = shape;
  const { block, path } = place;
  const gateUp = { name: `${path}.gate_up_proj`, planes, rowsStored: 2 * ffn, transposed: true };
  const down = { name: `${path}.down_proj`, planes, rowsStored: hidden, transposed: true };
  for (let expert = 0; expert < planes; expert++) {
    const [gate, up, output] = roles(shape);
    table.planeWithin({ ...gate, block, expert }, { ...gateUp, plane: expert, rowFirst: 0 });
    table.planeWithin({ ...up, block, expert }, { ...gateUp, plane: expert, rowFirst: ffn });
    table.planeWithin({ ...output, block, expert }, { ...down, plane: expert, rowFirst: 0 });
  }
}

/** GGUF's form: [experts, out, in] for each projection, or gate and up as the rows of one. */
export function stackedExpertPlanes(table: TensorTable, shape: ExpertShape, block: number): void {
  const { ffn, experts: planes } = shape;
  const together = `blk.${block}.ffn_gate_up_exps.weight`;
  const isFused = table.stored(together) !== undefined;
  for (let expert = 0; expert < planes; expert++) {
    for (const [i, plane] of roles(shape).entries()) {
      const name = ["gate", "up", "down"][i];
      const within = { planes, plane: expert, transposed: false };
      if (isFused && i < 2)
        table.planeWithin(
          { ...plane, block, expert },
          { ...within, name: together, rowsStored: 2 * ffn, rowFirst: i * ffn },
        );
      else
        table.planeWithin(
          { ...plane, block, expert },
          { ...within, name: `blk.${block}.ffn_${name}_exps.weight`, rowsStored: plane.rows, rowFirst: 0 },
        );
    }
  }
}
