// A step and its result as flat 32-bit words: one typed array each way. The image of worker/engine/encode.ts; a change is
// made in both and raises kAbi. Floats travel as their bits, 64-bit numbers as low word, high word.
//
//   step    MAGIC, step, counts of updates and rows, updates..., rows...
//   update  kind, slot, then
//             open      n, ids[n], generated_from, seed_low, seed_high, temperature, top_k, top_p, min_p, repetition, presence,
//                       frequency, n, (id, bias)[n], computed, n, blocks[n]
//             blocks    n, blocks[n]        truncate  length
//             fork      from, length, n, blocks[n]        copy  from, to        close  nothing        experts  version
//   row     slot, count, flags (1 sample, 2 logits, 4 margins), logprobs, n, drafts[n]
//
//   result  words: step, digest, rows, then for each row: slot, accepted, computed, n, tokens[n], details, for each detail: n,
//           top ids[n]; then the number of its logits.   floats: for each detail: logprob, score_gap, router_gap, top logprobs[n].
//           logits: of all rows, one after the other.
#pragma once
#include <span>
#include <vector>

#include "muster/engine.h"

namespace muster::addon {

constexpr uint32_t kAbi = 2;
constexpr uint32_t kStepMagic = 0x4d535431;  // "MST1"

Status decode_step(std::span<const uint32_t> words, Step* out);

struct EncodedResult {
  std::vector<uint32_t> words;
  std::vector<float> details, logits;
};
EncodedResult encode_result(StepResult&& result);

}  // namespace muster::addon
