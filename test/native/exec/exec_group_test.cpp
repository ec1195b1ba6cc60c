// Workers of one group over links of this machine: the same tokens as one worker, and what happens when one does not come.
#include "tiny_model.h"

using namespace tiny;

namespace {

// Two engines of one group over links of this machine, each the worker of one rank.
struct Pair { std::unique_ptr<Driver> driver[2]; Status status[2]; };

Pair open_pair(const ModelDesc& m, const File& file, const char* second_backend) {
  Pair pair;
  std::unique_ptr<TcpListener> listener[2];
  std::vector<std::string> addresses;
  for (auto& one : listener) {
    CHECK_OK(TcpListener::open("127.0.0.1:0", &one));
    addresses.push_back(one->address());
  }
  std::vector<std::thread> threads;
  for (uint32_t worker = 0; worker < 2; ++worker)
    threads.emplace_back([&, worker] {
      EngineOptions o = options(worker ? second_backend : "ref");
      o.stall_give_up_ms = 400;
      GroupDesc group{2, worker, 2, {0, 1}, {shard(m, worker, 2, 2)}};
      std::unique_ptr<Engine> engine;
      CHECK_OK(Engine::create(m, group, o, nullptr, &engine));
      const std::atomic<bool> cancel{false};
      const std::vector<FileDesc> files = {file.desc()};
      CHECK_OK(engine->load(files, file.slices(m, group.local[0]), nullptr, cancel));
      CHECK_EQ(engine->kv_init(64).field, std::string("comm"));
      std::shared_ptr<Comm> comm;
      CHECK_OK(make_tcp_comm(std::move(listener[worker]), {7, worker, {0, 1}, addresses, 5000, {200, 400}}, &comm));
      CHECK_OK(engine->connect(std::move(comm)));
      pair.status[worker] = engine->kv_init(64);
      pair.driver[worker] = std::make_unique<Driver>(std::move(engine));
    });
  for (std::thread& thread : threads) thread.join();
  return pair;
}

Step first_step() {
  Step step;
  step.updates = {opening(1, prompt(9, 3), 1)};
  step.rows = {row(1, 9)};
  return step;
}

}  // namespace

TEST("two workers sample the tokens of one, with equal digests and numerics ids") {
  const ModelDesc m = model();
  const File file(m);
  Driver together = open(m, file, 2, 2);
  Pair pair = open_pair(m, file, "ref");
  CHECK_OK(pair.status[0]);
  CHECK_OK(pair.status[1]);
  CHECK_EQ(pair.driver[0]->engine->numerics_id(), together.engine->numerics_id());
  CHECK_EQ(pair.driver[1]->engine->numerics_id(), together.engine->numerics_id());
  Step step = first_step();
  for (int i = 0; i < 5; ++i) {
    const StepResult want = together.run(step);
    auto a = pair.driver[0]->start(step), b = pair.driver[1]->start(step);
    const StepResult first = a.get(), second = b.get();
    CHECK_OK(first.status);
    CHECK_OK(second.status);
    CHECK_EQ(first.digest, want.digest);
    CHECK_EQ(second.digest, want.digest);
    step = {};
    step.rows = {row(1, 1)};
  }
}

TEST("E3: a rank that does not come is named in time, every launched step is answered, and then only close is") {
  const ModelDesc m = model();
  const File file(m);
  Pair pair = open_pair(m, file, "ref");
  const auto start = std::chrono::steady_clock::now();
  Step next;
  next.rows = {row(1, 1)};
  auto first = pair.driver[0]->start(first_step()), second = pair.driver[0]->start(next);
  const StepResult lost = first.get();
  CHECK(lost.status.code == Status::Code::lost);
  CHECK_EQ(lost.status.rank, 1);
  CHECK(second.get().status.code == Status::Code::lost);
  CHECK(pair.driver[0]->run(next).status.code == Status::Code::lost);
  pair.driver[0]->engine->close();
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(4));
}

TEST("A1: ranks of different backends do not serve together, and the message names both") {
  const ModelDesc m = model();
  const File file(m);
  Pair pair = open_pair(m, file, "cpu");
  for (const Status& status : pair.status) {
    CHECK_EQ(status.field, std::string("numerics_id"));
    CHECK(status.detail.find("rank 0") != std::string::npos && status.detail.find("rank 1") != std::string::npos);
    CHECK(status.detail.find("ref-") != std::string::npos && status.detail.find("cpu-") != std::string::npos);
  }
}

MUSTER_TEST_MAIN
