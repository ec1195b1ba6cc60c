// One suite, every backend: random stored weights, and a table of ops to feed them to. Owns its memory; the same seed gives the
// same case everywhere.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "exec/op_table.h"
#include "formats/format.h"
#include "formats/stored_matrix.h"
#include "muster/engine.h"

namespace conformance {

using namespace muster;
using Floats = std::vector<float>;

inline const std::vector<StoredType> stored_types = {StoredType::f32,  StoredType::f16,  StoredType::bf16, StoredType::q8_0, StoredType::q4_0,
                                                     StoredType::q4_1, StoredType::q4_k, StoredType::q5_k, StoredType::q6_k};
inline const std::vector<std::string> isas = {"avx512", "avx2", "scalar"};

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  float unit() { return float(int64_t(next() >> 40) - (int64_t{1} << 23)) * 0x1p-23f; }  // [-1, 1)
  Floats floats(size_t count, float scale = 1) {
    Floats out(count);
    for (float& x : out) x = unit() * scale;
    return out;
  }
};

// A stored part with sound bytes: random codes and scales, block factors of a size that keeps values below about 1.
struct Stored {
  StoredMatrix matrix;
  std::vector<uint8_t> bytes;

  Stored(StoredType type, uint32_t rows, Range columns, uint64_t seed) {
    const BlockFormat& format = *block_format(type);
    matrix.type = type;
    matrix.rows = rows;
    matrix.cols = columns.size();
    matrix.col_first = columns.begin;
    matrix.row_bytes = covering_bytes(format, 0, columns.end);
    bytes.resize(rows * matrix.row_bytes);
    Random random{seed};
    for (uint64_t at = 0; at < bytes.size(); at += format.bytes) fill_block(type, &bytes[at], format.bytes, random);
    matrix.data = bytes;
  }
  Stored(const Stored&) = delete;
  Stored(Stored&& other) noexcept : matrix(other.matrix), bytes(std::move(other.bytes)) { matrix.data = bytes; }

 private:
  static void put(uint8_t* at, uint16_t value) { std::memcpy(at, &value, 2); }
  static void fill_block(StoredType type, uint8_t* at, uint32_t size, Random& random) {
    if (type == StoredType::f32) {
      const float value = random.unit();
      std::memcpy(at, &value, 4);
      return;
    }
    if (type == StoredType::f16) return put(at, f32_to_f16(random.unit()));
    if (type == StoredType::bf16) return put(at, f32_to_bf16(random.unit()));
    for (uint32_t i = 0; i < size; ++i) at[i] = uint8_t(random.next());
    const bool k_quant = type == StoredType::q4_k || type == StoredType::q5_k || type == StoredType::q6_k;
    const float scale = k_quant ? 1.0f / 2048 : type == StoredType::q8_0 ? 1.0f / 128 : 1.0f / 8;
    put(type == StoredType::q6_k ? at + 208 : at, f32_to_f16(random.unit() * scale));
    const bool has_minimum = type == StoredType::q4_1 || type == StoredType::q4_k || type == StoredType::q5_k;
    if (has_minimum) put(at + 2, f32_to_f16(random.unit() * scale * 4));
  }
};

inline std::string name_of(const StoredMatrix& m) {
  return std::string(block_format(m.type)->name) + " " + std::to_string(m.rows) + "x" + std::to_string(m.cols) + " from " + std::to_string(m.col_first);
}

// One op table; rows go in and come out as vectors. Outputs start as NaN and have a row behind them that must stay as it was.
struct Machine {
  std::string name;
  std::unique_ptr<OpTable> ops;

  Floats read(Rows rows, size_t count) const {
    std::span<float> view;
    CHECK_OK(ops->view(rows, count, &view));
    return {view.begin(), view.end()};
  }
  // Followed by NaN: what is read past the end shows in the result.
  Rows rows(Floats values) const {
    Rows out = nullptr;
    values.resize(values.size() + 64, NAN);
    CHECK_OK(ops->alloc_rows(1, uint32_t(values.size()), &out));
    CHECK_OK(ops->commit(out, values.size(), values));
    return out;
  }
  static constexpr float guard = 12345;
  Rows output(size_t count) const {
    Floats values(count + 64, guard);
    std::fill_n(values.begin(), count, NAN);
    return rows(values);
  }
  Floats take(Rows rows, size_t count) const {
    Floats all = read(rows, count + 64);
    CHECK(std::all_of(all.begin() + std::ptrdiff_t(count), all.end(), [](float x) { return x == guard; }));
    all.resize(count);
    return all;
  }
  std::unique_ptr<Weight> pack(const std::vector<const Stored*>& parts) const {
    std::vector<StoredMatrix> matrices;
    for (const Stored* part : parts) matrices.push_back(part->matrix);
    std::unique_ptr<Weight> out;
    CHECK_OK(ops->pack(matrices, &out));
    return out;
  }
  Floats linear(const Weight& weight, const Floats& x) const {
    const uint32_t tokens = uint32_t(x.size() / weight.cols);
    const Rows out = output(size_t{tokens} * weight.rows);
    CHECK_OK(ops->linear(weight, tokens, rows(x), out));
    return take(out, size_t{tokens} * weight.rows);
  }
};

inline Machine reference() {
  Machine machine{"ref", nullptr};
  CHECK_OK(make_ref_ops({}, &machine.ops));
  return machine;
}

inline bool has(const std::string& isa) {
  const std::vector<std::string> here = devices().isas;
  return std::find(here.begin(), here.end(), isa) != here.end();
}
inline Machine cpu(const std::string& isa, uint32_t threads = 1) {
  DeviceOptions options;
  options.isa = isa;
  options.threads = threads;
  options.tokens_max = 33;
  options.top_k_max = 2;
  options.hidden = options.ffn_max = 64;
  Machine machine{isa + " x" + std::to_string(threads), nullptr};
  CHECK_OK(make_cpu_ops(options, &machine.ops));
  return machine;
}
// Every variant that this CPU has, on one, two and three threads. The variant it lacks has a skipped test of its own.
inline std::vector<Machine> machines() {
  std::vector<Machine> out;
  for (const std::string& isa : isas)
    if (has(isa))
      for (const uint32_t threads : {1u, 2u, 3u}) out.push_back(cpu(isa, threads));
  return out;
}

inline void check_same(const Floats& got, const Floats& want, const std::string& what) {
  CHECK_EQ(got.size(), want.size());
  if (got.size() != want.size()) return;
  for (size_t i = 0; i < got.size(); ++i)
    if (std::bit_cast<uint32_t>(got[i]) != std::bit_cast<uint32_t>(want[i])) {
      std::ostringstream text;
      text.precision(9);
      text << what << ": element " << i << " has other bits: " << got[i] << ", not " << want[i];
      return check::fail(__FILE__, __LINE__, text.str());
    }
}
inline void check_close(const Floats& got, const Floats& want, double tolerance, const std::string& what) {
  CHECK_EQ(got.size(), want.size());
  if (got.size() != want.size()) return;
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::fabs(double{got[i]} - want[i]) <= tolerance)) {
      std::ostringstream text;
      text.precision(9);
      text << what << ": element " << i << " is " << got[i] << ", not " << want[i] << " within " << tolerance;
      return check::fail(__FILE__, __LINE__, text.str());
    }
}
inline double largest(const Floats& values) {
  double out = 0;
  for (const float x : values) out = std::max(out, std::fabs(double{x}));
  return out;
}

}  // namespace conformance
