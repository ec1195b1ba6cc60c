// The table of planes that a family asks for. Owns: finding each stored tensor, checking its shape and type, shard rules by
// role, parameter counts. Does not own: what a family needs.
//
//   T1  a plane is in the table only if its stored tensor has exactly the shape the configuration implies.
//   T2  at the end every stored tensor was asked for or is named as ignored: a bias nobody adds would change answers silently.
//   T3  without a checkpoint the same calls synthesise the table, so that a plan needs only config.json.
import { ShardRule, StoredType, TensorRole, type TensorSpec } from "../../proto/gen/muster/v1/plan.ts";
import type { Naming } from "./names.ts";
import { reject, unsupported } from "./reject.ts";
import { blockOf, type Checkpoint, elementsOf, isFloat, type StoredTensor, shapeText } from "./stored.ts";

const RULES: ReadonlyMap<TensorRole, ShardRule> = new Map([
  [TensorRole.EMBEDDING, ShardRule.VOCAB],
  [TensorRole.FINAL_NORM, ShardRule.REPLICATE],
  [TensorRole.HEAD, ShardRule.VOCAB],
  [TensorRole.ATTENTION_NORM, ShardRule.REPLICATE],
  [TensorRole.QUERY, ShardRule.HEADS],
  [TensorRole.KEY, ShardRule.KV_HEADS],
  [TensorRole.VALUE, ShardRule.KV_HEADS],
  [TensorRole.OUTPUT, ShardRule.HEAD_ROWS],
  [TensorRole.MLP_NORM, ShardRule.REPLICATE],
  [TensorRole.GATE, ShardRule.COLUMNS],
  [TensorRole.UP, ShardRule.COLUMNS],
  [TensorRole.DOWN, ShardRule.ROWS],
  [TensorRole.ROUTER, ShardRule.REPLICATE],
  [TensorRole.EXPERT_GATE, ShardRule.EXPERT],
  [TensorRole.EXPERT_UP, ShardRule.EXPERT],
  [TensorRole.EXPERT_DOWN, ShardRule.EXPERT],
  [TensorRole.SHARED_GATE, ShardRule.COLUMNS],
  [TensorRole.SHARED_UP, ShardRule.COLUMNS],
  [TensorRole.SHARED_DOWN, ShardRule.ROWS],
  [TensorRole.ROPE_FACTORS, ShardRule.REPLICATE],
]);

/** Scales of quantised tensors by the names of other exporters; counted, not computed with. */
export const SCALES = /(_scale|_scale_inv|\.input_scale)$/;

/** How many stored tensors a table may have: 61 layers of 256 experts make 90,000 with their scales. */
const PLANES_MAX = 1_000_000;

/** How a type without a checkpoint is chosen, and how its scales are stored. */
export type Synthetic = {
  typeOf(role: TensorRole, rows: number): StoredType;
  /** Shape of the f32 scales that go with a plane of that role, where there are any. */
  scaleShape(role: TensorRole, rows: number, cols: number): [number, number] | undefined;
};

export type Plane = {
  role: TensorRole;
  rows: number;
  cols: number;
  block?: number;
  expert?: number;
  /** Where the naming has none for the role (latent projections). */
  name?: string;
  rule?: ShardRule;
  /** Scales and vision: stored, but no parameters of the text model. */
  uncounted?: boolean;
};

/** Where a plane lies in a stored tensor that holds several: `plane` of `planes` along the outermost dimension. */
export type Within = {
  name: string;
  planes: number;
  plane: number;
  rowsStored: number;
  rowFirst: number;
  transposed: boolean;
};

export class TensorTable {
  readonly planes: TensorSpec[] = [];
  readonly #checkpoint: Checkpoint | undefined;
  readonly #synthetic: Synthetic;
  readonly #naming: Naming;
  readonly #claimed = new Set<string>();
  #syntheticBytes = 0;
  #counted = new Map<string, { parameters: number; perExpert: Map<number, number> }>();

  constructor(checkpoint: Checkpoint | undefined, naming: Naming, synthetic: Synthetic) {
    this.#checkpoint = checkpoint;
    this.#naming = naming;
    this.#synthetic = synthetic;
  }

  has(role: TensorRole, block = -1, expert = -1): boolean {
    const name = this.#naming(role, { block, expert });
    return name !== undefined && this.stored(name) !== undefined;
  }

  stored(name: string): StoredTensor | undefined {
    return this.#checkpoint?.tensors.get(name);
  }

  vector(role: TensorRole, length: number, block = -1): void {
    this.plane({ role, rows: 1, cols: length, block });
  }

  linear(role: TensorRole, shape: readonly [rows: number, cols: number], block = -1): void {
    this.plane({ role, rows: shape[0], cols: shape[1], block });
  }

  /** A plane that is a stored tensor of its own. */
  plane(plane: Plane): void {
    const place = { block: plane.block ?? -1, expert: plane.expert ?? -1 };
    const name = plane.name ?? this.#naming(plane.role, place) ?? `blocks.${place.block}.${plane.role}`;
    const isVector = plane.rows === 1 && this.stored(name)?.shape.length === 1;
    this.#add(plane, this.#claim(name, isVector ? [plane.cols] : [plane.rows, plane.cols], plane.role), {
      name,
      planes: 1,
      plane: 0,
      rowsStored: plane.rows,
      rowFirst: 0,
      transposed: false,
    });
    this.#addScales(plane, name);
  }

  /** A plane inside a larger stored tensor. */
  planeWithin(plane: Plane, within: Within): void {
    const { planes, rowsStored, transposed } = within;
    const shape = transposed ? [planes, plane.cols, rowsStored] : [planes, rowsStored, plane.cols];
    const stored = this.#claim(within.name, shape, plane.role);
    if (transposed && !isFloat(stored.type))
      unsupported(this.#field(within.name), `${stored.typeName} cannot be read transposed`, stored.headerOffset);
    this.#add(plane, stored, within);
  }

  /** Everything not asked for yet whose name fits: counted as stored, held by no rank, no parameters of the text model. */
  others(pattern: RegExp): void {
    for (const stored of this.#checkpoint?.tensors.values() ?? []) {
      if (this.#claimed.has(stored.name) || !pattern.test(stored.name)) continue;
      this.#claimed.add(stored.name);
      const cols = stored.shape.at(-1) ?? 1;
      const rows = Math.max(1, Math.round((elementsOf(stored.shape) ?? 0) / Math.max(1, cols)));
      this.planes.push({
        ...{ name: stored.name, role: TensorRole.OTHER, rule: ShardRule.UNSPECIFIED, type: stored.type },
        ...{ block: -1, expert: -1, file: stored.file, offset: BigInt(stored.offset), rows, cols },
        ...{ transposed: false, rowsStored: rows, rowFirst: 0, bytes: BigInt(stored.bytes) },
      });
    }
  }

  /** Leaves stray tensors out that old exporters wrote. */
  ignore(pattern: RegExp): void {
    for (const name of this.#checkpoint?.tensors.keys() ?? []) if (pattern.test(name)) this.#claimed.add(name);
  }

  /** T2. */
  finish(family: string): void {
    for (const stored of this.#checkpoint?.tensors.values() ?? [])
      if (!this.#claimed.has(stored.name))
        unsupported(this.#field(stored.name), `family ${family} has no use for this tensor`, stored.headerOffset);
  }

  /** Parameters in all, and those that one token uses where a block of experts uses `topK` of them. */
  parameters(topK: number): { total: number; active: number } {
    let total = 0;
    let active = 0;
    for (const { parameters, perExpert } of this.#counted.values()) {
      total += parameters;
      active += parameters;
      const experts = [...perExpert.values()];
      const all = experts.reduce((sum, n) => sum + n, 0);
      total += all;
      active += experts.length ? (all / experts.length) * Math.min(topK, experts.length) : 0;
    }
    return { total, active };
  }

  /** Stored bytes of a synthesised table; 0 where there is a checkpoint. */
  get syntheticBytes(): number {
    return this.#syntheticBytes;
  }

  #field(name: string): string {
    const stored = this.stored(name);
    const file = this.#checkpoint?.files[stored?.file ?? 0]?.name ?? "config.json";
    return `${file}/${name}`;
  }

  #claim(name: string, shape: number[], role: TensorRole): StoredTensor {
    if (this.planes.length >= PLANES_MAX) reject(name, `more than ${PLANES_MAX} planes`);
    if (!this.#checkpoint) return this.#synthesise(name, shape, role);
    const stored = this.#checkpoint.tensors.get(name);
    if (!stored) reject(this.#field(name), `is missing; expected shape ${shapeText(shape)}`);
    if (shapeText(stored.shape) !== shapeText(shape)) {
      const detail = `has shape ${shapeText(stored.shape)}, the configuration implies ${shapeText(shape)}`;
      reject(this.#field(name), detail, stored.headerOffset);
    }
    if (stored.type === StoredType.UNSPECIFIED)
      unsupported(this.#field(name), `stored type ${stored.typeName} is not supported`, stored.headerOffset);
    this.#claimed.add(name);
    return stored;
  }

  #synthesise(name: string, shape: number[], role: TensorRole): StoredTensor {
    const type = this.#synthetic.typeOf(role, shape[0] ?? 1);
    const block = blockOf(type);
    const bytes = ((elementsOf(shape) ?? 0) / block.elements) * block.bytes;
    const offset = this.#syntheticBytes;
    this.#syntheticBytes += bytes;
    return { name, typeName: "", type, shape, file: 0, offset, bytes, headerOffset: 0 };
  }

  #add(plane: Plane, stored: StoredTensor, within: Within): void {
    const { role, rows, cols, block = -1, expert = -1 } = plane;
    const { elements, bytes } = blockOf(stored.type);
    const planeBytes = (within.rowsStored * cols * bytes) / elements;
    this.planes.push({
      ...{ name: stored.name, role, rule: plane.rule ?? RULES.get(role) ?? ShardRule.REPLICATE, type: stored.type },
      ...{ block, expert, file: stored.file, offset: BigInt(stored.offset + within.plane * planeBytes), rows, cols },
      ...{ transposed: within.transposed, rowsStored: within.rowsStored, rowFirst: within.rowFirst },
      bytes: BigInt((rows * cols * bytes) / elements),
    });
    if (!plane.uncounted) this.#count(plane, rows * cols);
  }

  #addScales(plane: Plane, name: string): void {
    const { role, rows, cols, block = -1, expert = -1 } = plane;
    const scaleName = `${name}_scale_inv`;
    const stored = this.stored(scaleName);
    const shape = this.#checkpoint
      ? stored && [stored.shape[0] ?? 1, stored.shape[1] ?? 1]
      : this.#synthetic.scaleShape(role, rows, cols);
    if (!shape) return;
    const [scaleRows = 1, scaleCols = 1] = shape;
    const rule = expert >= 0 ? ShardRule.EXPERT : ShardRule.REPLICATE;
    const scale = { role: TensorRole.OTHER, rows: scaleRows, cols: scaleCols, block, expert, rule, uncounted: true };
    this.#add(scale, this.#claim(scaleName, [scaleRows, scaleCols], TensorRole.ROPE_FACTORS), {
      ...{ name: scaleName, planes: 1, plane: 0, rowsStored: scaleRows, rowFirst: 0, transposed: false },
    });
  }

  #count(plane: Plane, parameters: number): void {
    if (plane.role === TensorRole.ROPE_FACTORS) return;
    const { block = -1, expert = -1 } = plane;
    const key = String(block);
    const counted = this.#counted.get(key) ?? { parameters: 0, perExpert: new Map<number, number>() };
    if (expert < 0) counted.parameters += parameters;
    else counted.perExpert.set(expert, (counted.perExpert.get(expert) ?? 0) + parameters);
    this.#counted.set(key, counted);
  }
}
