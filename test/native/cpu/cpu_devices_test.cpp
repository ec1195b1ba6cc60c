// What the machine allows: readers of the kernel's files, and this machine's answer.
#include <thread>

#include "check.h"
#include "cpu/devices.h"
#include "muster/engine.h"

using namespace muster::cpu;

TEST("cpu.max: whole CPUs, rounded up, at least one; no quota is no limit") {
  CHECK(cpus_of_cpu_max("max 100000\n") == std::nullopt);
  CHECK(cpus_of_cpu_max("200000 100000\n") == 2u);
  CHECK(cpus_of_cpu_max("150000 100000\n") == 2u);
  CHECK(cpus_of_cpu_max("5000 100000\n") == 1u);
  CHECK(cpus_of_cpu_max("9223372036854775807 1\n") == 2147483647u);
  for (const char* bad : {"", "max", "100000", "x y", "100000 0", "-1 100000", "99999999999999999999 100000"})
    CHECK(cpus_of_cpu_max(bad) == std::nullopt);
}

TEST("cgroup v1 quota: -1 is none") {
  CHECK(cpus_of_quota("-1\n", "100000\n") == std::nullopt);
  CHECK(cpus_of_quota("250000\n", "100000\n") == 3u);
  CHECK(cpus_of_quota("", "100000\n") == std::nullopt);
}

TEST("memory limits: max and v1's huge number are none") {
  CHECK(bytes_of_limit("max\n") == std::nullopt);
  CHECK(bytes_of_limit("9223372036854771712\n") == std::nullopt);
  CHECK(bytes_of_limit("1073741824\n") == 1073741824u);
  CHECK(bytes_of_limit("") == std::nullopt);
}

TEST("/proc/self/cgroup: the group's path by hierarchy") {
  const char* text = "12:memory:/a/m\n4:cpu,cpuacct:/a/b\n0::/unified\n";
  CHECK(group_path(text, "") == "/unified");
  CHECK(group_path(text, "cpu") == "/a/b");
  CHECK(group_path(text, "memory") == "/a/m");
  CHECK(group_path(text, "io") == std::nullopt);
  CHECK(group_path("", "") == std::nullopt);
  CHECK(group_path("garbage\n1:only", "cpu") == std::nullopt);
}

TEST("/proc/cpuinfo: the model name, empty where there is none") {
  CHECK_EQ(model_name("processor\t: 0\nmodel name\t: Some CPU 9000  \nflags\t: fpu\n"), std::string("Some CPU 9000"));
  CHECK_EQ(model_name("processor\t: 0\n"), std::string());
  CHECK_EQ(model_name("model name"), std::string());
}

TEST("devices: this machine has a variant, a CPU and memory") {
  const muster::DeviceInfo info = muster::devices();
  CHECK(!info.isas.empty());
  CHECK_EQ(info.isas.back(), std::string("scalar"));
  CHECK(info.cpus >= 1 && info.cpus <= std::max(1u, std::thread::hardware_concurrency()));
  CHECK(info.memory_bytes > uint64_t{1} << 26);
  const auto mebibytes = static_cast<unsigned long long>(info.memory_bytes >> 20);
  std::printf("  %s: %u cpus, %llu MiB, best variant %s\n", info.cpu.c_str(), info.cpus, mebibytes, info.isas[0].c_str());
}

MUSTER_TEST_MAIN
