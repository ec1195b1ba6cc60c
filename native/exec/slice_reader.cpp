#include "exec/slice_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "formats/format.h"

namespace muster {
namespace {

constexpr uint64_t kScratchBytes = 4 << 20;  // large enough for sequential reads, small beside any layer
constexpr uint64_t kPageBytes = 4096;        // strips shorter than this are read with what lies between: the disk does so anyway

bool mul(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_mul_overflow(a, b, out); }
bool add(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_add_overflow(a, b, out); }

std::string range_text(const Range& range) { return "[" + std::to_string(range.begin) + ", " + std::to_string(range.end) + ")"; }

Status check_shape(const TensorSlice& slice, const BlockFormat& block) {
  if (slice.rows == 0 || slice.cols == 0) return Status::invalid(slice.name, "has no rows or no columns");
  if (uint64_t(slice.row_first) + slice.rows > slice.rows_stored)
    return Status::invalid(slice.name, "rows " + std::to_string(slice.row_first) + " + " + std::to_string(slice.rows) +
                                           " exceed the " + std::to_string(slice.rows_stored) + " that are stored");
  if (slice.keep_rows.begin >= slice.keep_rows.end || slice.keep_rows.end > slice.rows)
    return Status::invalid(slice.name, "rows to keep " + range_text(slice.keep_rows) + " are not within " + std::to_string(slice.rows));
  if (slice.keep_cols.begin >= slice.keep_cols.end || slice.keep_cols.end > slice.cols)
    return Status::invalid(slice.name, "columns to keep " + range_text(slice.keep_cols) + " are not within " + std::to_string(slice.cols));
  if (slice.transposed && block.elements != 1) return Status::unsupported(slice.name, "a transposed plane of a quantised type");
  if (slice.cols % block.elements != 0)
    return Status::invalid(slice.name, std::to_string(slice.cols) + " columns do not fill blocks of " + std::to_string(block.elements));
  return Status::ok();
}

// Offset of value (major, minor bytes) after `base`.
bool locate(uint64_t base, uint64_t major, uint64_t stride, uint64_t minor, uint64_t* out) {
  uint64_t step = 0;
  return mul(major, stride, &step) && add(base, step, out) && add(*out, minor, out);
}

}  // namespace

ModelFiles::~ModelFiles() {
  for (const Open& file : files_)
    if (file.handle >= 0) ::close(file.handle);
}

Status ModelFiles::open(std::span<const FileDesc> files) {
  for (const FileDesc& file : files) {
    const int handle = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
    if (handle < 0) return Status::invalid(file.path, std::string("cannot be opened: ") + std::strerror(errno));
    files_.push_back({handle, file.bytes, file.path});
    struct stat info {};
    if (::fstat(handle, &info) != 0) return Status::invalid(file.path, std::string("cannot be examined: ") + std::strerror(errno));
    if (!S_ISREG(info.st_mode)) return Status::invalid(file.path, "is not a regular file");
    if (uint64_t(info.st_size) != file.bytes)
      return Status::invalid(file.path, "is " + std::to_string(info.st_size) + " bytes long, its headers were read at " +
                                            std::to_string(file.bytes) + "; plan again from the file as it is now");
  }
  return Status::ok();
}

Status ModelFiles::read(uint32_t file, uint64_t offset, std::span<uint8_t> out) const {
  const Open& source = files_[file];
  while (!out.empty()) {
    const ssize_t got = ::pread(source.handle, out.data(), std::min<size_t>(out.size(), 1u << 30), off_t(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Status::invalid(source.path, "read failed at offset " + std::to_string(offset) + ": " + std::strerror(errno));
    if (got == 0) return Status::invalid(source.path, "ended at offset " + std::to_string(offset) + " while it was read");
    offset += uint64_t(got);
    out = out.subspan(size_t(got));
  }
  return Status::ok();
}

Status plan_slice(const TensorSlice& slice, uint64_t file_bytes, SlicePlan* out) {
  const BlockFormat* format = block_format(slice.type);
  if (!format) return Status::unsupported(slice.name, "stored type " + std::to_string(int(slice.type)) + " cannot be loaded");
  const BlockFormat& block = *format;
  MUSTER_TRY(check_shape(slice, block));
  const Status outside = Status::invalid(slice.name, "lies outside its file of " + std::to_string(file_bytes) + " bytes (offset " +
                                                         std::to_string(slice.offset) + ")");
  uint64_t major = 0, minor = 0;
  if (slice.transposed) {
    out->stride = uint64_t(slice.rows_stored) * block.bytes;
    out->strip = uint64_t(slice.keep_rows.size()) * block.bytes;
    out->strips = slice.keep_cols.size();
    out->col_first = 0;
    out->row_bytes = uint64_t(slice.keep_cols.size()) * block.bytes;
    major = slice.keep_cols.begin;
    minor = (uint64_t(slice.row_first) + slice.keep_rows.begin) * block.bytes;
  } else {
    const uint64_t first_block = slice.keep_cols.begin / block.elements;
    out->stride = uint64_t(slice.cols) / block.elements * block.bytes;
    out->strip = covering_bytes(block, slice.keep_cols.begin, slice.keep_cols.size());
    out->strips = slice.keep_rows.size();
    out->col_first = uint32_t(slice.keep_cols.begin - first_block * block.elements);
    out->row_bytes = out->strip;
    major = uint64_t(slice.row_first) + slice.keep_rows.begin;
    minor = first_block * block.bytes;
  }
  uint64_t last = 0, end = 0;
  if (!locate(slice.offset, major, out->stride, minor, &out->first)) return outside;
  if (!locate(out->first, out->strips - 1, out->stride, 0, &last) || !add(last, out->strip, &end)) return outside;
  if (end > file_bytes) return outside;
  return Status::ok();
}

namespace {

using Sink = std::function<void(uint32_t first, uint32_t count, const uint8_t* data, uint64_t data_stride)>;

// Hands over the strips in order, a bounded number at a time.
Status read_strips(const ModelFiles& files, const TensorSlice& slice, const SlicePlan& plan, const LoadWatch& watch, const Sink& sink) {
  const bool with_gaps = plan.strip == plan.stride || (plan.strip < kPageBytes && plan.stride <= kScratchBytes);
  const uint64_t per_read = with_gaps ? std::max<uint64_t>(1, kScratchBytes / plan.stride) : 1;
  std::vector<uint8_t> scratch;
  for (uint64_t first = 0; first < plan.strips; first += per_read) {
    if (watch.cancel && watch.cancel->load(std::memory_order_relaxed)) return Status::invalid("load", "cancelled");
    const uint64_t count = std::min<uint64_t>(per_read, plan.strips - first);
    scratch.resize((count - 1) * plan.stride + plan.strip);
    MUSTER_TRY(files.read(slice.file, plan.first + first * plan.stride, scratch));
    sink(uint32_t(first), uint32_t(count), scratch.data(), plan.stride);
    if (watch.advance) watch.advance(count * plan.strip);
  }
  return Status::ok();
}

template <class Value>
void scatter_columns(const uint8_t* from, uint64_t from_stride, uint32_t columns, uint32_t rows, uint8_t* to, uint64_t row_bytes) {
  for (uint32_t r = 0; r < rows; ++r)
    for (uint32_t c = 0; c < columns; ++c)
      std::memcpy(to + r * row_bytes + c * sizeof(Value), from + c * from_stride + r * sizeof(Value), sizeof(Value));
}

}  // namespace

Status read_slice(const ModelFiles& files, const TensorSlice& slice, const LoadWatch& watch, HostMatrix* out) {
  if (slice.file >= files.size())
    return Status::invalid(slice.name, "names file " + std::to_string(slice.file) + " of " + std::to_string(files.size()));
  SlicePlan plan;
  MUSTER_TRY(plan_slice(slice, files.length(slice.file), &plan));
  const uint32_t rows = slice.keep_rows.size();
  out->bytes.resize(plan.row_bytes * rows);
  uint8_t* target = out->bytes.data();
  const uint32_t value_bytes = block_format(slice.type)->bytes;
  MUSTER_TRY(read_strips(files, slice, plan, watch, [&](uint32_t first, uint32_t count, const uint8_t* data, uint64_t stride) {
    if (!slice.transposed) {
      for (uint32_t i = 0; i < count; ++i) std::memcpy(target + (first + uint64_t(i)) * plan.row_bytes, data + i * stride, plan.strip);
    } else if (value_bytes == 4) {
      scatter_columns<uint32_t>(data, stride, count, rows, target + uint64_t(first) * 4, plan.row_bytes);
    } else {
      scatter_columns<uint16_t>(data, stride, count, rows, target + uint64_t(first) * 2, plan.row_bytes);
    }
  }));
  out->view = {slice.type, rows, slice.keep_cols.size(), plan.col_first, plan.row_bytes, out->bytes};
  return Status::ok();
}

}  // namespace muster
