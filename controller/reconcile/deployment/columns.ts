// What the columns of `kubectl get` show, as text. Pure.
import type { ShardPlanSpec } from "../../api/shard-plan.ts";

/** `tp4·ep2·2x`: sizes of 1 say nothing but tp; the last part is replicas. */
export function planColumn(cut: ShardPlanSpec["cut"], replicas: number): string {
  const sizes = [
    `tp${cut.tp}`,
    cut.dp > 1 ? `dp${cut.dp}` : "",
    cut.ep > 1 ? `ep${cut.ep}` : "",
    cut.pp > 1 ? `pp${cut.pp}` : "",
    `${replicas}x`,
  ];
  return sizes.filter((part) => part !== "").join("·");
}

export function throughputColumn(tokensPerSecond: number): string {
  if (tokensPerSecond >= 100_000) return `${(tokensPerSecond / 1000).toFixed(0)}k`;
  if (tokensPerSecond >= 1000) return `${(tokensPerSecond / 1000).toFixed(1)}k`;
  return tokensPerSecond.toFixed(tokensPerSecond >= 10 ? 0 : 1);
}

/** `3m20s`, in steps of five seconds: nobody reads an estimate closer than that, and each step is a write. */
export function spanText(ms: number): string {
  const seconds = Math.max(5, Math.ceil(ms / 5000) * 5);
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (hours > 0) return `${hours}h${minutes}m`;
  return minutes > 0 ? `${minutes}m${seconds % 60}s` : `${seconds}s`;
}
