// Products of stored weights on every backend: near the reference, and the same bits whatever the batch, the threads and the
// instruction set.
#include "conformance.h"

using namespace conformance;

namespace {

const std::vector<uint32_t> batches = {1, 2, 3, 5, 8, 17, 33};

// 1e-6 of sum |x w|: a chain of 256 fused multiply-adds errs by up to 256 half-ulps of its partial sums in the worst case and by
// about their square root in practice; with random signs partial sums are far below sum |x w|. A dropped or doubled column, a
// wrong scale or code is off by 1e-4 and more.
constexpr double relative = 1e-6;

std::vector<double> magnitudes(const std::vector<const Stored*>& parts, const Floats& x, uint32_t cols) {
  std::vector<double> out;
  Floats row(cols);
  for (size_t t = 0; t < x.size() / cols; ++t)
    for (const Stored* part : parts)
      for (uint32_t r = 0; r < part->matrix.rows; ++r) {
        read_row(part->matrix, r, row.data());
        double sum = 0;
        for (uint32_t c = 0; c < cols; ++c) sum += std::fabs(double{row[c]} * x[t * cols + c]);
        out.push_back(sum);
      }
  return out;
}

void check_weight(const std::vector<const Stored*>& parts, uint64_t seed) {
  const uint32_t cols = parts[0]->matrix.cols, tokens = batches.back();
  std::string what;
  for (const Stored* part : parts) what += (what.empty() ? "" : " + ") + name_of(part->matrix);
  const Floats x = Random{seed}.floats(size_t{tokens} * cols);
  const Machine ref = reference();
  const auto ref_weight = ref.pack(parts);
  const Floats want = ref.linear(*ref_weight, x);
  const std::vector<double> magnitude = magnitudes(parts, x, cols);
  const uint32_t rows = ref_weight->rows;
  Floats first;
  for (const Machine& machine : machines()) {
    const auto weight = machine.pack(parts);
    CHECK_EQ(weight->rows, rows);
    CHECK_EQ(weight->cols, cols);
    const Floats whole = machine.linear(*weight, x);
    for (size_t i = 0; i < whole.size(); ++i)
      if (!(std::fabs(double{whole[i]} - want[i]) <= relative * magnitude[i] + 1e-30))
        return check::fail(__FILE__, __LINE__, machine.name + ", " + what + ": element " + std::to_string(i) + " is " + std::to_string(whole[i]) +
                                                   ", not " + std::to_string(want[i]));
    if (first.empty()) first = whole;
    check_same(whole, first, machine.name + ", " + what + " against the first variant");
    for (const uint32_t batch : batches) {
      const uint32_t from = (tokens - batch) / 2;  // the same rows at other places of other batches
      const Floats part(x.begin() + std::ptrdiff_t(from) * cols, x.begin() + std::ptrdiff_t(from + batch) * cols);
      const Floats expected(whole.begin() + std::ptrdiff_t(from) * rows, whole.begin() + std::ptrdiff_t(from + batch) * rows);
      check_same(machine.linear(*weight, part), expected, machine.name + ", " + what + ", batch of " + std::to_string(batch));
    }
  }
}

void check_type(StoredType type) {
  // rows: below, at and beside multiples of 16 and 64; columns: whole and cut superblocks, more and less than a chunk of 256.
  struct Shape { uint32_t rows; Range columns; };
  const Shape shapes[] = {{97, {0, 288}}, {16, {96, 160}}, {5, {224, 256}}, {70, {160, 960}}, {129, {32, 544}}, {1, {0, 32}}};
  uint64_t seed = 1;
  for (const Shape& shape : shapes) {
    const Stored stored(type, shape.rows, shape.columns, seed += 11);
    check_weight({&stored}, seed);
  }
  // A cut may fall inside a code group, too; float types take any column.
  for (const Range& columns : {Range{8, 48}, Range{272, 300}, Range{7, 8}, Range{16, 48}, Range{33, 610}}) {
    const Stored stored(type, 35, columns, seed += 11);
    check_weight({&stored}, seed);
  }
}

}  // namespace

TEST("linear: f32 weights") { check_type(StoredType::f32); }
TEST("linear: f16 weights") { check_type(StoredType::f16); }
TEST("linear: bf16 weights") { check_type(StoredType::bf16); }
TEST("linear: Q8_0 weights") { check_type(StoredType::q8_0); }
TEST("linear: Q4_0 weights") { check_type(StoredType::q4_0); }
TEST("linear: Q4_1 weights") { check_type(StoredType::q4_1); }
TEST("linear: Q4_K weights") { check_type(StoredType::q4_k); }
TEST("linear: Q5_K weights") { check_type(StoredType::q5_k); }
TEST("linear: Q6_K weights") { check_type(StoredType::q6_k); }

TEST("linear: stacked parts of several types, none of them a multiple of 16 rows") {
  const Range columns{32, 320};
  const Stored q(StoredType::q4_k, 40, columns, 5), k(StoredType::q6_k, 9, columns, 6);
  const Stored v(StoredType::bf16, 7, columns, 7), w(StoredType::q8_0, 16, columns, 8);
  check_weight({&q, &k, &v, &w}, 9);
  const Range cut{16, 40};  // Q6_K's group begins here, the others' is cut
  const Stored a(StoredType::q4_k, 20, cut, 15), b(StoredType::q6_k, 9, cut, 16), c(StoredType::f32, 7, cut, 17);
  check_weight({&a, &b, &c}, 19);
}

// 512 x 320 x 33 multiply-adds are enough for the pool to share them, and for token slices.
TEST("linear: large enough that all threads take part") {
  for (const StoredType type : {StoredType::q4_k, StoredType::bf16}) {
    const Stored stored(type, 512, {0, 320}, 21);
    check_weight({&stored}, 22);
    const Stored wide(type, 16, {0, 512}, 23);
    const Machine ref = reference();
    const auto ref_weight = ref.pack({&wide});
    const Floats x = Random{24}.floats(300 * 512);
    const Floats want = ref.linear(*ref_weight, x);
    Floats first;
    for (const Machine& machine : machines()) {
      const Floats got = machine.linear(*machine.pack({&wide}), x);
      if (first.empty()) first = got;
      check_close(got, want, 1e-4, machine.name);
      check_same(got, first, machine.name + ", 300 tokens");
    }
  }
}

TEST("embed: the stored values to the bit, zero outside the table") {
  for (const StoredType type : stored_types) {
    const Stored upper(type, 21, {32, 320}, 31), lower(StoredType::q6_k, 4, {32, 320}, 32);
    const std::vector<uint32_t> ids = {100, 99, 120, 121, 124, 125, 0, 4000000000u, 107};
    Batch batch;
    batch.tokens = uint32_t(ids.size());
    batch.ids = ids.data();
    std::vector<Machine> all = machines();
    all.insert(all.begin(), reference());
    Floats want;
    for (const Machine& machine : all) {
      const auto table = machine.pack({&upper, &lower});
      const Rows out = machine.output(ids.size() * 288);
      CHECK_OK(machine.ops->embed(*table, 100, batch, out));
      Floats got = machine.take(out, ids.size() * 288);
      for (float& x : got) x += 0.0f;  // -0 and 0 are one value
      if (want.empty()) want = got;
      check_same(got, want, machine.name + ", " + name_of(upper.matrix));
    }
  }
}

TEST("head: rows of any tokens, in the order asked") {
  const Stored stored(StoredType::q6_k, 97, {0, 256}, 41);
  const Floats x = Random{42}.floats(9 * 256);
  const Machine ref = reference();
  const auto ref_weight = ref.pack({&stored});
  for (const std::vector<uint32_t>& tokens : {std::vector<uint32_t>{8}, {2, 3, 4}, {7, 0, 7, 5}, {}}) {
    Floats want(tokens.size() * 97), got(tokens.size() * 97, NAN);
    CHECK_OK(ref.ops->head(*ref_weight, tokens, ref.rows(x), want));
    for (const Machine& machine : machines()) {
      const auto weight = machine.pack({&stored});
      CHECK_OK(machine.ops->head(*weight, tokens, machine.rows(x), got));
      check_close(got, want, 2e-5, machine.name);
      const Floats all = machine.linear(*weight, x);
      for (size_t i = 0; i < tokens.size(); ++i)
        check_same({got.begin() + std::ptrdiff_t(i) * 97, got.begin() + std::ptrdiff_t(i + 1) * 97},
                   {all.begin() + std::ptrdiff_t(tokens[i]) * 97, all.begin() + std::ptrdiff_t(tokens[i] + 1) * 97},
                   machine.name + ", head against linear");
    }
    Floats narrow(tokens.size() * 97 + 1);
    CHECK(!cpu("scalar").ops->head(*cpu("scalar").pack({&stored}), tokens, nullptr, narrow).is_ok());
  }
}

TEST("add_norm: adds where told to, then scales by the root mean square") {
  for (const uint32_t cols : {1u, 7u, 64u, 5120u}) {
    const Stored stored(StoredType::bf16, 1, {0, cols}, 51);
    const Floats x = Random{52}.floats(3 * cols), delta = Random{53}.floats(3 * cols);
    for (const bool adds : {false, true}) {
      std::vector<Machine> all = machines();
      all.insert(all.begin(), reference());
      Floats want, sum, first;
      for (const Machine& machine : all) {
        std::unique_ptr<Weight> weight;
        CHECK_OK(machine.ops->pack_vector(stored.matrix, &weight));
        const Rows rows = machine.rows(x), out = machine.output(x.size());
        CHECK_OK(machine.ops->add_norm(*weight, 1e-5, 3, rows, adds ? machine.rows(delta) : nullptr, out));
        const Floats got = machine.take(out, x.size());
        if (machine.name == "ref") want = got, sum = machine.read(rows, x.size());
        else if (first.empty()) first = got;
        check_close(got, want, 1e-6 * largest(want), machine.name);
        check_same(machine.read(rows, x.size()), sum, machine.name + ", x");
        if (!first.empty()) check_same(got, first, machine.name);
      }
    }
  }
}

TEST("pack: lying shapes are refused by name") {
  for (const Machine& machine : machines()) {
    Stored stored(StoredType::q4_k, 4, {0, 256}, 61), other(StoredType::q4_k, 4, {0, 512}, 62);
    std::unique_ptr<Weight> out;
    CHECK_EQ(machine.ops->pack({}, &out).field, std::string("parts"));
    CHECK_EQ(machine.ops->pack(std::vector<StoredMatrix>{stored.matrix, other.matrix}, &out).field, std::string("parts"));
    stored.matrix.rows = 5;
    CHECK_EQ(machine.ops->pack({&stored.matrix, 1}, &out).field, std::string("data"));
    CHECK_EQ(machine.ops->pack_vector(other.matrix, &out).field, std::string("rows"));
    CHECK(!out);
  }
}

TEST("isa: what the CPU lacks is refused, and the message says what it has") {
  DeviceOptions options;
  options.isa = "neon";
  std::unique_ptr<OpTable> out;
  const Status status = make_cpu_ops(options, &out);
  CHECK(status.code == Status::Code::unsupported);
  for (const std::string& isa : devices().isas) CHECK(status.detail.find(isa) != std::string::npos);
  CHECK(status.detail.find("neon") != std::string::npos);
}

TEST("isa: avx512 took part") { if (!has("avx512")) SKIP("this CPU lacks AVX-512 F, BW, DQ or VL"); }
TEST("isa: avx2 took part") { if (!has("avx2")) SKIP("this CPU lacks AVX2, FMA or F16C"); }

MUSTER_TEST_MAIN
