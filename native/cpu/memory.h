// Aligned zeroed memory, sized once. Owns bytes; does not own their meaning.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "muster/status.h"

namespace muster::cpu {

inline constexpr size_t line_bytes = 64;
inline constexpr size_t huge_page_bytes = size_t{2} << 20;

class Buffer {
 public:
  // Untouched pages of a large buffer take no memory: calloc gets them from the kernel already zero.
  Status allocate(const std::string& what, uint64_t bytes) {
    const uint64_t padded = bytes + huge_page_bytes;
    void* base = padded < bytes ? nullptr : std::calloc(1, bytes < huge_page_bytes ? bytes + line_bytes : padded);
    if (!base) return Status::out_of_memory(what, bytes, uint64_t(sysconf(_SC_AVPHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE)));
    base_.reset(base);
    const size_t align = bytes < huge_page_bytes ? line_bytes : huge_page_bytes;
    at_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base) + align - 1) / align * align);
    bytes_ = bytes;
    if (align == huge_page_bytes) madvise(at_, bytes, MADV_HUGEPAGE);  // only a hint: fewer TLB misses while streaming weights
    return Status::ok();
  }
  // For what the options did not say (the number of experts): grows, keeps nothing, then stays.
  Status reserve(const std::string& what, uint64_t bytes) { return bytes <= bytes_ ? Status::ok() : allocate(what, bytes); }

  uint8_t* data() const { return at_; }
  float* floats() const { return reinterpret_cast<float*>(at_); }
  uint64_t bytes() const { return bytes_; }

 private:
  struct Free { void operator()(void* p) const { std::free(p); } };
  std::unique_ptr<void, Free> base_;
  uint8_t* at_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace muster::cpu
