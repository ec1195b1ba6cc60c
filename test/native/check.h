// The native test harness: TEST("sentence") { CHECK(...) }, run by MUSTER_TEST_MAIN. Prints one line for each test:
// "ok - name", "not ok - name" or "skip - name: reason"; exit 1 where one failed. An argument runs only names that contain it.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test { std::string name; std::function<void()> body; };
inline std::vector<Test>& tests() { static std::vector<Test> all; return all; }
struct State { int failures = 0; std::string skip; };
inline State& state() { static State s; return s; }
struct Register { Register(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); } };

inline void fail(const char* file, int line, const std::string& what) {
  if (++state().failures <= 10) std::printf("  %s:%d: %s\n", file, line, what.c_str());
}
template <class A, class B> void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": " << a << " is not " << b;
  fail(file, line, out.str());
}
inline void near(double a, double b, double tolerance, const char* text, const char* file, int line) {
  if (std::fabs(a - b) <= tolerance) return;
  std::ostringstream out;
  out.precision(17);
  out << text << ": " << a << " and " << b << " differ by more than " << tolerance;
  fail(file, line, out.str());
}
inline int run(int argc, char** argv) {
  int failed = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && test.name.find(argv[1]) == std::string::npos) continue;
    state() = {};
    test.body();
    if (state().failures) { ++failed; std::printf("not ok - %s\n", test.name.c_str()); }
    else if (!state().skip.empty()) std::printf("skip - %s: %s\n", test.name.c_str(), state().skip.c_str());
    else std::printf("ok - %s\n", test.name.c_str());
    std::fflush(stdout);
  }
  return failed ? 1 : 0;
}

}  // namespace check

#define CHECK_CONCAT2(a, b) a##b
#define CHECK_CONCAT(a, b) CHECK_CONCAT2(a, b)
#define TEST(name) TEST_AT(name, __LINE__)
#define TEST_AT(name, line)                                                                        \
  static void CHECK_CONCAT(test_body_, line)();                                                    \
  static check::Register CHECK_CONCAT(test_register_, line)(name, CHECK_CONCAT(test_body_, line)); \
  static void CHECK_CONCAT(test_body_, line)()
#define CHECK(condition) do { if (!(condition)) check::fail(__FILE__, __LINE__, #condition); } while (0)
#define CHECK_EQ(a, b) check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_NEAR(a, b, tolerance) check::near((a), (b), (tolerance), #a " ~ " #b, __FILE__, __LINE__)
#define CHECK_OK(expression) do { if (auto s_ = (expression); !s_.is_ok()) check::fail(__FILE__, __LINE__, std::string(#expression ": ") + s_.field + ": " + s_.detail); } while (0)
#define SKIP(reason) do { check::state().skip = (reason); return; } while (0)
#define MUSTER_TEST_MAIN int main(int argc, char** argv) { return check::run(argc, argv); }
