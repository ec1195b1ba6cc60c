// Reads the part of a stored plane that one rank keeps. Owns the open files and the arithmetic of offsets; knows nothing of
// roles or backends.
//
//   R1  no byte outside [0, file length) is asked for: every offset is computed in 64 bits with overflow checks first.
//   R2  scratch is bounded by kScratchBytes or one strip, whatever the plane's size.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "exec/op_table.h"

namespace muster {

class ModelFiles {
 public:
  ModelFiles() = default;
  ModelFiles(const ModelFiles&) = delete;
  ModelFiles& operator=(const ModelFiles&) = delete;
  ~ModelFiles();
  // Opens all; refuses a file whose length is not the one that its headers were read at.
  Status open(std::span<const FileDesc> files);
  size_t size() const { return files_.size(); }
  uint64_t length(uint32_t file) const { return files_[file].bytes; }
  // Fills `out` from `offset`; the range was checked.
  Status read(uint32_t file, uint64_t offset, std::span<uint8_t> out) const;

 private:
  struct Open { int handle = -1; uint64_t bytes = 0; std::string path; };
  std::vector<Open> files_;
};

// The covering bytes of a slice: what it takes in host memory and where its strips lie in the file.
struct SlicePlan {
  uint64_t first = 0;    // file offset of the first strip
  uint64_t stride = 0;   // from strip to strip
  uint64_t strip = 0;    // bytes of a strip: a row's covering blocks, or where transposed a column's kept values
  uint32_t strips = 0;
  uint32_t col_first = 0;
  uint64_t row_bytes = 0;  // of the result
  uint64_t bytes() const { return strip * strips; }
};
Status plan_slice(const TensorSlice& slice, uint64_t file_bytes, SlicePlan* out);

struct LoadWatch {
  std::function<void(uint64_t)> advance;  // bytes just read of those kept
  const std::atomic<bool>* cancel = nullptr;
};

struct HostMatrix {
  std::vector<uint8_t> bytes;
  StoredMatrix view;
};
Status read_slice(const ModelFiles& files, const TensorSlice& slice, const LoadWatch& watch, HostMatrix* out);

}  // namespace muster
