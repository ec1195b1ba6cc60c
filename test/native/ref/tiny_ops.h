// A reference op table with tiny weights and rows made from vectors of floats. Owns nothing but the table.
#pragma once
#include <bit>
#include <memory>
#include <vector>

#include "check.h"
#include "exec/op_table.h"

namespace tiny {

using muster::Batch;
using muster::OpTable;
using muster::Rows;
using muster::StoredMatrix;
using muster::Weight;

struct Ops {
  std::unique_ptr<OpTable> table;
  Ops() { CHECK_OK(muster::make_ref_ops({}, &table)); }
  OpTable* operator->() const { return table.get(); }

  Rows rows(const std::vector<float>& values) const {
    Rows out = nullptr;
    CHECK_OK(table->alloc_rows(1, static_cast<uint32_t>(values.size()), &out));
    CHECK_OK(table->commit(out, values.size(), values));
    return out;
  }
  std::vector<float> read(Rows rows, uint64_t count) const {
    std::span<float> view;
    CHECK_OK(table->view(rows, count, &view));
    return {view.begin(), view.end()};
  }
  std::unique_ptr<Weight> weight(uint32_t cols, const std::vector<float>& values) const {
    StoredMatrix matrix;
    matrix.rows = static_cast<uint32_t>(values.size()) / cols;
    matrix.cols = cols;
    matrix.row_bytes = cols * 4;
    matrix.data = {reinterpret_cast<const uint8_t*>(values.data()), values.size() * 4};
    std::unique_ptr<Weight> out;
    CHECK_OK(table->pack({&matrix, 1}, &out));
    return out;
  }
};

// Tokens of several sequences; the tables and arrays live here.
struct Tokens {
  std::vector<uint32_t> ids, positions, sequence;
  std::vector<std::vector<uint32_t>> blocks;  // by sequence
  std::vector<std::span<const uint32_t>> tables;
  Batch batch() {
    tables.assign(blocks.begin(), blocks.end());
    return {static_cast<uint32_t>(positions.size()), ids.data(), positions.data(), sequence.data(), tables};
  }
};

inline void check_near(const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
  CHECK_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size() && i < want.size(); ++i) CHECK_NEAR(got[i], want[i], tolerance);
}

}  // namespace tiny
