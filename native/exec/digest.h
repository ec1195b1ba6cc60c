// FNV-1a over 64 bits: digests of what ranks and workers must agree on. Not a defence against anybody.
#pragma once
#include <cstdint>
#include <string_view>

namespace muster {

struct Digest {
  uint64_t value = 0xcbf29ce484222325ull;
  void add(uint64_t word) {
    for (int i = 0; i < 8; ++i) byte(uint8_t(word >> (8 * i)));
  }
  void add(std::string_view text) {
    for (const char c : text) byte(uint8_t(c));
    byte(0);
  }

 private:
  void byte(uint8_t b) { value = (value ^ b) * 0x100000001b3ull; }
};

}  // namespace muster
