#include "cpu/panels.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "formats/codes.h"
#include "formats/format.h"
#include "formats/stored_matrix.h"

namespace muster::cpu {
namespace {

uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

PanelLayout float_layout(StoredType type, uint32_t cols) {
  PanelLayout layout;
  layout.kind = type == StoredType::f32 ? PanelKind::f32 : type == StoredType::f16 ? PanelKind::f16 : PanelKind::bf16;
  layout.k = cols;
  const uint64_t column = lanes * (type == StoredType::f32 ? 4 : 2);
  layout.panel_bytes = round_up(round_up(cols, 2) * column, line_bytes);  // bf16 keeps columns in pairs
  return layout;
}

PanelLayout code_layout(const CodeShape& shape, const StoredMatrix& stored, uint32_t lead) {
  PanelLayout layout;
  layout.kind = shape.code_max - shape.code_min < 16 ? PanelKind::code4 : PanelKind::code8;
  layout.two_level = shape.has_scales;
  layout.has_minimum = shape.has_minimum;
  if (layout.kind == PanelKind::code4) layout.zero = uint8_t(-shape.code_min);
  layout.group = shape.group;
  layout.k = uint32_t(round_up(uint64_t{lead} + stored.cols, shape.group));
  const uint32_t groups = layout.k / shape.group, per_super = shape.elements / shape.group;
  const uint64_t width = layout.has_minimum ? 2 : 1;
  layout.supers_shift = uint32_t(std::countr_zero(per_super));
  layout.supers_offset = (stored.col_first - lead) / shape.group % per_super;
  const uint64_t supers = layout.two_level ? (layout.supers_offset + groups + per_super - 1) / per_super : 0;
  const uint64_t scale_bytes = layout.two_level ? 1 : 2;
  layout.scales_at = uint32_t(round_up(supers * width * lanes * 2, line_bytes));
  layout.codes_at = uint32_t(round_up(layout.scales_at + uint64_t{groups} * width * lanes * scale_bytes, line_bytes));
  layout.panel_bytes = round_up(layout.codes_at + uint64_t{layout.k} * lanes / (layout.kind == PanelKind::code4 ? 2 : 1), line_bytes);
  return layout;
}

Part part_of(const StoredMatrix& stored, uint32_t row) {
  Part part;
  const CodeShape* shape = code_shape(stored.type);
  part.lead = shape ? stored.col_first % shape->group : 0;
  part.layout = shape ? code_layout(*shape, stored, part.lead) : float_layout(stored.type, stored.cols);
  part.row = row;
  part.rows = stored.rows;
  return part;
}

void put_floats(const StoredMatrix& stored, uint32_t row, uint32_t lane, uint8_t* panel) {
  const uint8_t* from = stored.data.data() + uint64_t{row} * stored.row_bytes;
  const uint64_t size = stored.type == StoredType::f32 ? 4 : 2;
  from += uint64_t{stored.col_first} * size;
  for (uint64_t k = 0; k < stored.cols; ++k) {
    const uint64_t at = stored.type == StoredType::bf16 ? (k / 2 * lanes + lane) * 4 + k % 2 * 2 : (k * lanes + lane) * size;
    std::memcpy(panel + at, from + k * size, size);
  }
}

struct GroupPlace { uint32_t source, target, super, lane; };  // group of the block; group, superblock and lane of the panel

// planes: supers, scales, codes
void put_group(const BlockCodes& block, const PanelLayout& layout, const GroupPlace& place, uint8_t* const (&planes)[3]) {
  const uint32_t width = layout.has_minimum ? 2 : 1, lane = place.lane;
  auto* d = reinterpret_cast<uint16_t*>(planes[layout.two_level ? 0 : 1]) + lane;
  d += size_t{layout.two_level ? place.super : place.target} * width * lanes;
  d[0] = block.d;
  if (layout.has_minimum) d[lanes] = block.dmin;
  if (layout.two_level) {
    uint8_t* scale = planes[1] + size_t{place.target} * width * lanes + lane;
    scale[0] = uint8_t(block.scale[place.source]);
    if (layout.has_minimum) scale[lanes] = block.minimum[place.source];
  }
  const int8_t* code = block.code + size_t{place.source} * layout.group;
  for (uint32_t i = 0; i < layout.group; ++i) {
    const size_t k = size_t{place.target} * layout.group + i;
    if (layout.kind == PanelKind::code8) {
      planes[2][k * lanes + lane] = uint8_t(code[i]);
    } else {
      uint32_t* eight = reinterpret_cast<uint32_t*>(planes[2]) + k / 8 * lanes + lane;
      *eight |= uint32_t(code[i] + layout.zero) << 4 * (k % 8);
    }
  }
}

struct CodeSource { const StoredMatrix* stored; const CodeShape* shape; uint32_t block_bytes, row; };

void put_codes(const CodeSource& source, const Part& part, uint32_t lane, uint8_t* panel) {
  const PanelLayout& layout = part.layout;
  const uint32_t first = source.stored->col_first - part.lead, end = first + layout.k;  // elements of the covering blocks
  const uint8_t* row = source.stored->data.data() + uint64_t{source.row} * source.stored->row_bytes;
  uint8_t* planes[3] = {panel, panel + layout.scales_at, panel + layout.codes_at};
  BlockCodes codes;
  for (uint32_t b = first / source.shape->elements; b * source.shape->elements < end; ++b) {
    unpack_block(source.stored->type, row + uint64_t{b} * source.block_bytes, &codes);
    for (uint32_t g = 0; g < source.shape->elements / layout.group; ++g) {
      const uint32_t element = b * source.shape->elements + g * layout.group;
      if (element < first || element >= end) continue;
      put_group(codes, layout, {g, (element - first) / layout.group, b - first / source.shape->elements, lane}, planes);
    }
  }
}

void put_panel(const StoredMatrix& stored, const Part& part, uint32_t row, uint8_t* panel) {
  const CodeShape* shape = code_shape(stored.type);
  for (uint32_t lane = 0; lane < lanes && row + lane < stored.rows; ++lane) {
    if (shape) put_codes({&stored, shape, block_format(stored.type)->bytes, row + lane}, part, lane, panel);
    else put_floats(stored, row + lane, lane, panel);
  }
}

bool is_paired(const CpuWeight& weight) {
  const size_t half = weight.groups.size() / 2;
  if (weight.groups.size() % 2 != 0 || weight.rows % 2 != 0) return false;
  for (size_t i = 0; i < half; ++i) {
    const PanelGroup &gate = weight.groups[i], &up = weight.groups[i + half];
    if (gate.count != up.count) return false;
    for (uint32_t p = 0; p < gate.count; ++p) {
      const Panel &a = weight.panels[gate.first + p], &b = weight.panels[up.first + p];
      if (a.row + weight.rows / 2 != b.row || a.rows != b.rows) return false;
    }
  }
  return true;
}

}  // namespace

Status CpuWeight::pack(std::span<const StoredMatrix> stored, Pool& pool) {
  MUSTER_TRY(check_parts(stored));
  uint64_t total = 0;
  rows = 0;
  cols = stored[0].cols;
  for (const StoredMatrix& matrix : stored) {
    Part part = part_of(matrix, rows);
    part.panel_first = uint32_t(panels.size());
    for (uint32_t row = 0; row < matrix.rows; row += lanes)
      panels.push_back({nullptr, rows + row, std::min(lanes, matrix.rows - row)});
    const uint32_t count = uint32_t(panels.size()) - part.panel_first;
    // A single part may be gate over up: groups must not run over the middle, or they could not be paired.
    const uint32_t half = stored.size() == 1 && matrix.rows % (2 * lanes) == 0 ? count / 2 : count;
    for (uint32_t first = 0; first < count;) {
      const uint32_t size = std::min(group_panels, (first < half ? half : count) - first);
      groups.push_back({uint32_t(parts.size()), part.panel_first + first, size});
      first += size;
    }
    padded = padded || part.layout.k != matrix.cols;
    total += count * part.layout.panel_bytes;
    rows += matrix.rows;
    parts.push_back(part);
  }
  MUSTER_TRY(memory.allocate("weights", total));
  uint8_t* at = memory.data();
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const uint32_t count = (part.rows + lanes - 1) / lanes;
    uint8_t* base = at;
    for (uint32_t p = 0; p < count; ++p) panels[part.panel_first + p].data = base + p * part.layout.panel_bytes;
    pool.run(count, uint64_t{part.rows} * part.layout.k, [&](uint32_t p, uint32_t) {
      put_panel(stored[i], part, p * lanes, base + p * part.layout.panel_bytes);
    });
    at += count * part.layout.panel_bytes;
  }
  bytes = total;
  paired = is_paired(*this);
  return Status::ok();
}

Status CpuWeight::pack_vector(const StoredMatrix& stored) {
  MUSTER_TRY(check_matrix(stored));
  if (stored.rows != 1) return Status::invalid("rows", "a vector has one row, not " + std::to_string(stored.rows));
  rows = 1;
  cols = stored.cols;
  bytes = uint64_t{cols} * sizeof(float);
  MUSTER_TRY(memory.allocate("weights", bytes));
  read_row(stored, 0, memory.floats());
  return Status::ok();
}

}  // namespace muster::cpu
