// Stored matrices as panels. Owns how a stored type maps to a panel layout and the memory of packed weights; the layout itself
// is described in kernels.h, bit layouts of stored blocks are known to formats/ alone.
//
//   W1  every stacked part has panels of its own: a panel never holds rows of two parts, and rows past a part's end are zero.
//   W2  codes stay codes: a packed weight takes the stored bits, but Q5_K and Q6_K codes take 8 bits each for now.
//   W3  a cut that begins inside a code group keeps the whole group; `lead` columns before it meet zeros in x.
#pragma once
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/pool.h"
#include "exec/op_table.h"

namespace muster::cpu {

struct Part {
  PanelLayout layout;
  uint32_t lead = 0;               // columns of the layout before the first kept one
  uint32_t row = 0, rows = 0;      // of the whole weight
  uint32_t panel_first = 0;
};

struct PanelGroup { uint32_t part = 0, first = 0, count = 0; };  // panels of one task

class CpuWeight final : public Weight {
 public:
  std::vector<Part> parts;
  std::vector<Panel> panels;
  std::vector<PanelGroup> groups;
  // Some part's layout has more columns than the weight: its x has to be padded first.
  bool padded = false;
  // Group i and group i + groups / 2 hold rows r.. and rows / 2 + r..: gate and up of the same columns.
  bool paired = false;
  Buffer memory;
  const float* values() const { return memory.floats(); }  // of a vector

  Status pack(std::span<const StoredMatrix> stored, Pool& pool);
  Status pack_vector(const StoredMatrix& stored);
};

}  // namespace muster::cpu
