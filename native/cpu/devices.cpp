#include "cpu/devices.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <sstream>

#include "cpu/cpu_ops.h"
#include "muster/engine.h"

namespace muster {
namespace cpu {
namespace {

std::optional<int64_t> number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end == text.data()) return std::nullopt;
  return value;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return file ? text.str() : "";
}

template <class Value> void lower(std::optional<Value>& least, std::optional<Value> value) {
  if (value && (!least || *value < *least)) least = value;
}

// Calls look(folder) for a group's folder and each one above it: a limit anywhere on the way up holds. In a container the path
// may not exist under the mount; then the mount itself is the group.
template <class Look> void each_level(const std::string& mount, std::string path, Look&& look) {
  for (;;) {
    look(mount + (path == "/" ? "" : path));
    const size_t slash = path.rfind('/');
    if (path.empty() || path == "/" || slash == std::string::npos) return;
    path = slash == 0 ? "/" : path.substr(0, slash);
  }
}

struct Limits { std::optional<uint32_t> cpus; std::optional<uint64_t> bytes; };

Limits read_limits() {
  Limits limits;
  const std::string groups = read_file("/proc/self/cgroup");
  if (const auto path = group_path(groups, ""))
    each_level("/sys/fs/cgroup", *path, [&](const std::string& folder) {
      lower(limits.cpus, cpus_of_cpu_max(read_file(folder + "/cpu.max")));
      lower(limits.bytes, bytes_of_limit(read_file(folder + "/memory.max")));
    });
  if (const auto path = group_path(groups, "cpu"))
    each_level("/sys/fs/cgroup/cpu", *path, [&](const std::string& folder) {
      lower(limits.cpus, cpus_of_quota(read_file(folder + "/cpu.cfs_quota_us"), read_file(folder + "/cpu.cfs_period_us")));
    });
  if (const auto path = group_path(groups, "memory"))
    each_level("/sys/fs/cgroup/memory", *path, [&](const std::string& folder) {
      lower(limits.bytes, bytes_of_limit(read_file(folder + "/memory.limit_in_bytes")));
    });
  return limits;
}

uint32_t cpus_of_affinity() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return uint32_t(std::max(1, CPU_COUNT(&set)));
  return uint32_t(std::max(1l, sysconf(_SC_NPROCESSORS_ONLN)));  // more CPUs than the set holds
}

}  // namespace

std::optional<uint32_t> cpus_of_quota(std::string_view quota, std::string_view period) {
  const auto used = number(quota), of = number(period);
  if (!used || !of || *used <= 0 || *of <= 0) return std::nullopt;  // -1: no quota
  return uint32_t(std::clamp<int64_t>(*used / *of + (*used % *of != 0), 1, std::numeric_limits<int32_t>::max()));
}

std::optional<uint32_t> cpus_of_cpu_max(std::string_view text) {
  const size_t space = text.find(' ');
  return space == std::string_view::npos ? std::nullopt : cpus_of_quota(text.substr(0, space), text.substr(space + 1));
}

std::optional<uint64_t> bytes_of_limit(std::string_view text) {
  const auto value = number(text);
  if (!value || *value <= 0 || *value >= int64_t{1} << 60) return std::nullopt;
  return uint64_t(*value);
}

std::optional<std::string> group_path(std::string_view cgroup, std::string_view controller) {
  while (!cgroup.empty()) {
    const size_t end = std::min(cgroup.find('\n'), cgroup.size());
    const std::string_view line = cgroup.substr(0, end);
    cgroup.remove_prefix(std::min(end + 1, cgroup.size()));
    const size_t first = line.find(':'), second = first == std::string_view::npos ? first : line.find(':', first + 1);
    if (second == std::string_view::npos) continue;
    const std::string names = "," + std::string(line.substr(first + 1, second - first - 1)) + ",";
    const bool found = controller.empty() ? names == ",," : names.find("," + std::string(controller) + ",") != std::string::npos;
    if (found) return std::string(line.substr(second + 1));
  }
  return std::nullopt;
}

std::string model_name(std::string_view cpuinfo) {
  const size_t key = cpuinfo.find("model name");
  if (key == std::string_view::npos) return "";
  const size_t colon = cpuinfo.find(':', key), end = std::min(cpuinfo.find('\n', key), cpuinfo.size());
  if (colon == std::string_view::npos || colon > end) return "";
  std::string_view name = cpuinfo.substr(colon + 1, end - colon - 1);
  while (!name.empty() && name.front() == ' ') name.remove_prefix(1);
  while (!name.empty() && name.back() == ' ') name.remove_suffix(1);
  return std::string(name);
}

}  // namespace cpu

DeviceInfo devices() {
  DeviceInfo info;
  for (const cpu::Kernels* kernels : cpu::kernels_of_this_cpu()) info.isas.push_back(kernels->isa);
  info.cpu = cpu::model_name(cpu::read_file("/proc/cpuinfo"));
  const cpu::Limits limits = cpu::read_limits();
  info.cpus = std::min(cpu::cpus_of_affinity(), limits.cpus.value_or(std::numeric_limits<uint32_t>::max()));
  const uint64_t memory = uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE));
  info.memory_bytes = std::min(memory, limits.bytes.value_or(memory));
  return info;
}

}  // namespace muster
