// What the machine allows, read from the kernel's text files. The readers of text are pure, so that tests can feed them.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace muster::cpu {

// Whole CPUs of a quota, at least 1: "max 100000" has none, "150000 100000" gives 2 (a part of a CPU still runs a thread).
std::optional<uint32_t> cpus_of_cpu_max(std::string_view text);                              // cgroup v2 cpu.max
std::optional<uint32_t> cpus_of_quota(std::string_view quota, std::string_view period);      // cgroup v1, in microseconds
std::optional<uint64_t> bytes_of_limit(std::string_view text);                               // memory.max; "max" and v1's 2^63 have none
// The group's path in /proc/self/cgroup: of v2 ("0::/path") where controller is empty, else of v1 ("4:cpu,cpuacct:/path").
std::optional<std::string> group_path(std::string_view cgroup, std::string_view controller);
std::string model_name(std::string_view cpuinfo);                                            // "" where there is none

}  // namespace muster::cpu
