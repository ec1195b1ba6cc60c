// What is read of a file: just the kept bytes, whatever the layout; and what is refused, by the name of tensor or file.
#include <algorithm>

#include "exec/slice_reader.h"
#include "tiny_model.h"

using namespace tiny;

namespace {

struct Temp {
  std::string path;
  explicit Temp(const std::vector<uint8_t>& bytes) {
    char name[] = "/tmp/muster-slice-XXXXXX";
    const int handle = ::mkstemp(name);
    path = name;
    size_t at = 0;
    while (at < bytes.size()) at += size_t(::write(handle, bytes.data() + at, bytes.size() - at));
    ::close(handle);
  }
  ~Temp() { ::unlink(path.c_str()); }
};

// 16-bit values that tell where they lie.
std::vector<uint8_t> numbered(uint32_t count) {
  std::vector<uint8_t> out;
  for (uint32_t i = 0; i < count; ++i) out.push_back(uint8_t(i)), out.push_back(uint8_t(i >> 8));
  return out;
}

uint32_t value_at(const HostMatrix& m, uint32_t row, uint32_t col) {
  const uint8_t* at = m.view.data.data() + row * m.view.row_bytes + (m.view.col_first + col) * 2;
  return at[0] | uint32_t(at[1]) << 8;
}

TensorSlice slice_of(uint32_t rows, uint32_t cols) {
  TensorSlice s;
  s.type = StoredType::f16;
  s.rows = s.rows_stored = rows;
  s.cols = cols;
  s.keep_rows = {0, rows};
  s.keep_cols = {0, cols};
  s.name = "plane";
  return s;
}

struct Loaded { Status status; uint64_t progress = 0, total = 0, calls = 0; };

Loaded load(const ModelDesc& m, std::vector<FileDesc> files, const std::vector<TensorSlice>& slices, bool cancelled = false) {
  GroupDesc group;
  group.worker_of_rank = {0};
  group.local = {shard(m, 0, 1, 1)};
  std::unique_ptr<Engine> engine;
  Loaded out;
  out.status = Engine::create(m, group, options(), nullptr, &engine);
  if (!out.status.is_ok()) return out;
  const std::atomic<bool> cancel{cancelled};
  out.status = engine->load(files, slices, [&](uint64_t done, uint64_t total) { out.progress = done, out.total = total, ++out.calls; }, cancel);
  return out;
}

}  // namespace

TEST("any rows and columns of a plane, plain or transposed, are the values that were asked for") {
  const Temp file(numbered(40 * 30 + 8));
  ModelFiles files;
  const std::vector<FileDesc> descs = {{file.path, (40 * 30 + 8) * 2}};
  CHECK_OK(files.open(descs));
  for (const bool transposed : {false, true})
    for (const Range rows : {Range{0, 25}, Range{3, 4}, Range{7, 22}})
      for (const Range cols : {Range{0, 30}, Range{29, 30}, Range{5, 17}}) {
        TensorSlice s = slice_of(25, 30);
        s.offset = 16;
        s.rows_stored = 40;
        s.row_first = 11;
        s.transposed = transposed;
        s.keep_rows = rows;
        s.keep_cols = cols;
        HostMatrix m;
        uint64_t advanced = 0;
        CHECK_OK(read_slice(files, s, {[&](uint64_t bytes) { advanced += bytes; }, nullptr}, &m));
        CHECK_EQ(advanced, uint64_t(rows.size()) * cols.size() * 2);
        CHECK_EQ(m.view.rows, rows.size());
        for (uint32_t r = 0; r < rows.size(); ++r)
          for (uint32_t c = 0; c < cols.size(); ++c) {
            const uint32_t row = 11 + rows.begin + r, col = cols.begin + c;
            CHECK_EQ(value_at(m, r, c), 8 + (transposed ? col * 40 + row : row * 30 + col));
          }
      }
}

TEST("a cut inside a quantised block reads the covering blocks and says where it begins") {
  std::vector<uint8_t> bytes(4 * 4 * 34);  // 4 rows of 4 blocks of 32
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 7);
  const Temp file(bytes);
  ModelFiles files;
  const std::vector<FileDesc> descs = {{file.path, bytes.size()}};
  CHECK_OK(files.open(descs));
  TensorSlice s = slice_of(4, 128);
  s.type = StoredType::q8_0;
  s.keep_rows = {1, 3};
  s.keep_cols = {40, 100};
  HostMatrix m;
  CHECK_OK(read_slice(files, s, {}, &m));
  CHECK_EQ(m.view.col_first, 8u);
  CHECK_EQ(m.view.row_bytes, 3u * 34);
  for (uint32_t r = 0; r < 2; ++r)
    for (uint32_t i = 0; i < 3 * 34; ++i) CHECK_EQ(int(m.view.data[r * 3 * 34 + i]), int(bytes[((r + 1) * 4 + 1) * 34 + i]));
}

TEST("R1: planes that leave their file, overflow or lie about their shape are refused before a byte is read") {
  const Temp file(numbered(100));
  ModelFiles files;
  const std::vector<FileDesc> descs = {{file.path, 200}};
  CHECK_OK(files.open(descs));
  const auto refused = [&](auto change) {
    TensorSlice s = slice_of(10, 10);
    change(s);
    HostMatrix m;
    const Status status = read_slice(files, s, {}, &m);
    CHECK(!status.is_ok());
    CHECK_EQ(status.field, std::string("plane"));
    CHECK(m.bytes.empty());
  };
  refused([](TensorSlice& s) { s.offset = 2; });
  refused([](TensorSlice& s) { s.offset = UINT64_MAX - 10; });
  refused([](TensorSlice& s) { s.rows = s.rows_stored = 11, s.keep_rows.end = 11; });
  refused([](TensorSlice& s) { s.rows = s.rows_stored = UINT32_MAX, s.cols = UINT32_MAX, s.keep_rows.end = UINT32_MAX, s.keep_cols.end = UINT32_MAX; });
  refused([](TensorSlice& s) { s.transposed = true, s.rows_stored = UINT32_MAX; });
  refused([](TensorSlice& s) { s.row_first = 1; });
  refused([](TensorSlice& s) { s.keep_rows = {4, 4}; });
  refused([](TensorSlice& s) { s.keep_rows = {4, 11}; });
  refused([](TensorSlice& s) { s.keep_cols = {10, 9}; });
  refused([](TensorSlice& s) { s.type = StoredType(77); });
  refused([](TensorSlice& s) { s.type = StoredType::q8_0; });                                   // 10 columns are no block
  refused([](TensorSlice& s) { s.type = StoredType::q8_0, s.cols = 32, s.transposed = true; });
  refused([](TensorSlice& s) { s.file = 1; });
}

TEST("a file of another length, a missing file and a folder are named") {
  const ModelDesc m = model();
  const File file(m);
  const std::vector<TensorSlice> slices = file.slices(m, shard(m, 0, 1, 1));
  FileDesc longer = file.desc();
  longer.bytes += 1;
  Status status = load(m, {longer}, slices).status;
  CHECK_EQ(status.field, longer.path);
  CHECK(status.detail.find(std::to_string(longer.bytes)) != std::string::npos);
  CHECK_EQ(load(m, {{"/nowhere/model.safetensors", 5}}, slices).status.field, std::string("/nowhere/model.safetensors"));
  CHECK_EQ(load(m, {{"/tmp", 5}}, slices).status.field, std::string("/tmp"));
}

TEST("L1: a plane that is missing, doubled, strange or of another shape is named with its role and layer") {
  const ModelDesc m = model();
  const File file(m);
  const std::vector<TensorSlice> good = file.slices(m, shard(m, 0, 1, 1));
  const Loaded whole = load(m, {file.desc()}, good);
  CHECK_OK(whole.status);
  CHECK_EQ(whole.progress, file.desc().bytes - 64);
  CHECK_EQ(whole.total, whole.progress);
  const auto at = [&](Role role) { return std::ranges::find(good, role, &TensorSlice::role) - good.begin(); };
  const auto mention = [&](const std::vector<TensorSlice>& slices, const std::string& text) {
    const Status status = load(m, {file.desc()}, slices).status;
    CHECK(status.code == Status::Code::invalid);
    const std::string all = status.field + " " + status.detail;
    if (all.find(text) == std::string::npos) CHECK_EQ(all, text);
  };
  std::vector<TensorSlice> slices = good;
  slices.erase(slices.begin() + at(Role::expert_up));
  mention(slices, "expert_up of layer 1, expert 0, rank 0 is missing");
  slices = good;
  slices.push_back(good[size_t(at(Role::router))]);
  mention(slices, "router of layer 1, rank 0 is given twice");
  slices = good;
  slices[size_t(at(Role::down))].cols = 47;
  mention(slices, "down of layer 0, rank 0) is [32, 47], the model asks for [32, 48]");
  slices = good;
  slices[size_t(at(Role::query))].keep_rows.end = 8;
  mention(slices, "keeps rows 0..8");
  slices = good;
  slices.push_back(good[size_t(at(Role::gate))]);
  slices.back().block = 1;
  mention(slices, "gate of layer 1, rank 0 has no place in this model");
  slices = good;
  slices.push_back(good[0]);
  slices.back().rank = 3;
  mention(slices, "is for rank 3");
  slices = good;
  slices.push_back(good[0]);
  slices.back().role = Role::rope_factors;
  CHECK_OK(load(m, {file.desc()}, slices).status);
}

TEST("a load that is cancelled ends") {
  const ModelDesc m = model();
  const File file(m);
  const Loaded loaded = load(m, {file.desc()}, file.slices(m, shard(m, 0, 1, 1)), true);
  CHECK_EQ(loaded.status.field, std::string("load"));
  CHECK_EQ(loaded.status.detail, std::string("cancelled"));
}

TEST("models, groups and options that make no sense are refused at create, by name") {
  const auto refused = [](auto change, const std::string& field) {
    ModelDesc m = model();
    GroupDesc g;
    g.worker_of_rank = {0};
    g.local = {shard(m, 0, 1, 1)};
    EngineOptions o = options();
    change(m, g, o);
    std::unique_ptr<Engine> engine;
    const Status status = Engine::create(m, g, o, nullptr, &engine);
    CHECK_EQ(status.field, field);
    CHECK(!engine);
  };
  refused([](auto& m, auto&, auto&) { m.blocks.clear(); }, "model.blocks");
  refused([](auto& m, auto&, auto&) { m.vocab = 0; }, "model.vocab");
  refused([](auto& m, auto&, auto&) { m.blocks[0].attention.kv_heads = 3; }, "model.blocks[0].attention.kv_heads");
  refused([](auto& m, auto&, auto&) { m.blocks[0].attention.rope_frequencies.pop_back(); }, "model.blocks[0].attention.rope_frequencies");
  refused([](auto& m, auto&, auto&) { m.blocks[0].attention.mask_span = 0; }, "model.blocks[0].attention.mask_span");
  refused([](auto& m, auto&, auto&) { m.blocks[1].moe.top_k = 5; }, "model.blocks[1].moe.top_k");
  refused([](auto& m, auto&, auto&) { m.blocks[1].moe.score = RouterScore::softmax; }, "model.blocks[1].moe.score");
  refused([](auto& m, auto&, auto&) { m.kv_groups.clear(); }, "model.kv_groups");
  refused([](auto&, auto& g, auto&) { g.local[0].vocab.end = 68; }, "group.local[0].vocab");
  refused([](auto&, auto& g, auto&) { g.local[0].kv_heads = {0, 1}; }, "group.local[0] in layer 0.kv_heads");
  refused([](auto&, auto& g, auto&) { g.local[0].experts = {1, 0}; }, "group.local[0] in layer 1.experts[1]");
  refused([](auto&, auto& g, auto&) { g.local.clear(); }, "group.local");
  refused([](auto&, auto&, auto& o) { o.rows_max = 0; }, "options.rows_max");
  refused([](auto&, auto&, auto& o) { o.backend = "abacus"; }, "options.backend");
}

TEST("A2: parts that leave something out are refused when the ranks agree") {
  const ModelDesc m = model();
  const File file(m);
  const auto refused = [&](auto change, const std::string& field) {
    GroupDesc g;
    g.worker_of_rank = {0};
    g.local = {shard(m, 0, 1, 1)};
    change(g.local[0]);
    std::unique_ptr<Engine> engine;
    CHECK_OK(Engine::create(m, g, options(), nullptr, &engine));
    const std::atomic<bool> cancel{false};
    const std::vector<FileDesc> files = {file.desc()};
    CHECK_OK(engine->load(files, file.slices(m, g.local[0]), nullptr, cancel));
    CHECK_EQ(engine->kv_init(8).field, field);
  };
  refused([](RankShard& s) { s.vocab.end = 66; }, "vocab");
  refused([](RankShard& s) { s.dense_ffn.begin = 8; }, "dense_ffn");
  refused([](RankShard& s) { s.experts = {0, 1, 3}; }, "experts");
}

MUSTER_TEST_MAIN
