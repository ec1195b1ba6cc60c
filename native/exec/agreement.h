// What the ranks of a group tell each other before they serve, and the numerics id that follows from it.
//
//   A1  all ranks have the same backend, block size, cut, model and KV size; a difference names both ranks.
//   A2  the ranks' parts cover the model once: nothing is summed twice or left out.
//   A3  equal numerics ids give equal bits; the id does not tell on which worker a rank lives.
#pragma once
#include "exec/weights.h"
#include "muster/comm.h"

namespace muster {

struct RankClaim {                       // what one rank says of itself
  const ModelDesc* model = nullptr;
  const RankShard* shard = nullptr;
  std::string backend;                   // OpTable::numerics()
  uint32_t world = 1, kv_block_tokens = 0, kv_blocks = 0;
  uint64_t layout_digest = 0;
};

struct Agreement {
  std::string numerics_id;
  std::vector<Range> vocab_of_rank;
};

// A collective of its own step 0 where there is a comm.
Status agree(const RankClaim& claim, Comm* comm, Agreement* out);

}  // namespace muster
