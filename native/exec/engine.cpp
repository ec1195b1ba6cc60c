// The engine's life: jobs in order on one thread, which runs every local rank and then settles the step. Owns the queue, the
// fault that ends it, and the threads; does not own how a rank computes (local_rank.h) or what a step may ask (step_check.h).
//
//   G1  one job at a time; within it all local ranks run together, and none is left behind in a collective: the first fault
//       closes the comm, which ends every wait.
//   G2  `done` of a step is called once, in launch order, also after a fault.
//   G3  close waits a bounded time; a thread that does not end keeps its own state alive and is left behind.
#include <algorithm>
#include <chrono>
#include <deque>

#include "exec/local_rank.h"
#include "exec/model_check.h"
#include "exec/rank_threads.h"
#include "exec/step_check.h"

namespace muster {
namespace {

using Clock = std::chrono::steady_clock;
// No exception crosses: what a library throws becomes a status of the work it interrupted.
template <class Work>
Status guarded(const std::string& what, const Work& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory(what, 0, 0);
  } catch (const std::exception& error) {
    return Status::internal(what, error.what());
  }
}

double ms_since(Clock::time_point start) { return std::chrono::duration<double, std::milli>(Clock::now() - start).count(); }

// All state that threads touch; alive until the last of them has ended.
struct Core {
  ModelDesc model;
  GroupDesc group;
  EngineOptions options;
  std::shared_ptr<Comm> comm;   // null where the world is one rank
  std::vector<std::unique_ptr<LocalRank>> ranks;
  std::unique_ptr<Slots> slots;

  mutable std::mutex mutex;
  std::condition_variable wake, end;
  std::deque<std::function<void(RankThreads&)>> jobs;
  bool stopping = false, ended = false;
  Status fault;                      // lost or internal: nothing but close is answered
  std::unique_ptr<StepCheck> check;  // there once kv_init is done
  uint32_t in_flight = 0;
  std::vector<std::vector<uint64_t>> expert_tokens;
  std::string numerics_id;
  std::vector<Memory> memory;

  Status connect(std::shared_ptr<Comm> own);
  void serve();
  void post(std::function<void(RankThreads&)> job);
  Status call(const std::function<Status(RankThreads&)>& job, const std::function<Status()>& before = [] { return Status::ok(); });
  Status on_ranks(RankThreads& threads, const std::function<Status(LocalRank&, size_t)>& work);
  Status collective(RankThreads& threads, const std::function<Status(LocalRank&, size_t)>& work);
  Status run_step(RankThreads& threads, const Step& step, StepResult* out);
  Status fail(const Status& status);
};

Status Core::connect(std::shared_ptr<Comm> own) {
  if (!own || own->world() != group.world)
    return Status::invalid("comm", "spans " + std::to_string(own ? own->world() : 0) + " ranks, the group has " + std::to_string(group.world));
  std::lock_guard lock(mutex);
  if (comm || stopping) return Status::invalid("comm", "is connected or closed");
  if (group.world == 1) return Status::ok();
  comm = std::move(own);
  for (const auto& rank : ranks) rank->connect(comm.get());
  return Status::ok();
}

void Core::serve() {
  RankThreads threads(ranks.size());
  std::unique_lock lock(mutex);
  for (;;) {
    wake.wait(lock, [this] { return stopping || !jobs.empty(); });
    if (jobs.empty()) break;
    auto job = std::move(jobs.front());
    jobs.pop_front();
    lock.unlock();
    job(threads);
    job = nullptr;
    lock.lock();
  }
  ended = true;
  end.notify_all();
}

void Core::post(std::function<void(RankThreads&)> job) {
  jobs.push_back(std::move(job));
  wake.notify_one();
}

// A job whose caller waits for it; `before` is under the lock that orders it among the steps.
Status Core::call(const std::function<Status(RankThreads&)>& job, const std::function<Status()>& before) {
  struct Waiting { std::mutex mutex; std::condition_variable done; bool is_done = false; Status status; } waiting;
  {
    std::lock_guard lock(mutex);
    if (stopping) return Status::invalid("engine", "is closed");
    if (!fault.is_ok()) return fault;
    MUSTER_TRY(before());
    post([&](RankThreads& threads) {
      Status status = guarded("engine", [&] { return job(threads); });
      std::lock_guard lock(waiting.mutex);
      waiting.status = std::move(status);
      waiting.is_done = true;
      waiting.done.notify_one();
    });
  }
  std::unique_lock lock(waiting.mutex);
  waiting.done.wait(lock, [&] { return waiting.is_done; });
  return waiting.status;
}

Status Core::on_ranks(RankThreads& threads, const std::function<Status(LocalRank&, size_t)>& work) {
  std::vector<Status> statuses(ranks.size());
  threads.run([&](size_t i) { statuses[i] = guarded("rank " + std::to_string(ranks[i]->rank()), [&] { return work(*ranks[i], i); }); });
  // What began it says more than the waits that it ended.
  for (const Status& status : statuses)
    if (!status.is_ok() && status.code != Status::Code::lost) return status;
  for (const Status& status : statuses)
    if (!status.is_ok()) return status;
  return Status::ok();
}

// Ranks that wait for each other: where one fails the others are freed.
Status Core::collective(RankThreads& threads, const std::function<Status(LocalRank&, size_t)>& work) {
  const Status status = on_ranks(threads, [&](LocalRank& rank, size_t i) {
    Status own = guarded("rank " + std::to_string(rank.rank()), [&] { return work(rank, i); });
    if (!own.is_ok() && comm) comm->close();
    return own;
  });
  return status.is_ok() ? status : fail(status);
}

// Nothing but close is answered from now on.
Status Core::fail(const Status& status) {
  std::lock_guard lock(mutex);
  if (fault.is_ok()) fault = status;
  return status;
}

Status Core::run_step(RankThreads& threads, const Step& step, StepResult* out) {
  {
    std::lock_guard lock(mutex);
    if (!fault.is_ok()) return fault;
  }
  const Clock::time_point start = Clock::now();
  const StepWork work = slots->begin(step);
  std::vector<std::vector<RowChoices>> choices(ranks.size());
  MUSTER_TRY(collective(threads, [&](LocalRank& rank, size_t i) { return rank.step(work, &choices[i]); }));
  out->rows = slots->settle(step, choices[0]);
  out->digest = digest_of(out->rows);
  out->step_ms = ms_since(start);
  if (comm)
    for (const auto& rank : ranks) out->wait_ms = std::max(out->wait_ms, comm->waited_ms(rank->rank()));
  std::lock_guard lock(mutex);
  check->settle(step, out->rows);
  if (!work.ids.empty()) ranks[0]->count_experts(&expert_tokens);
  if (work.experts)
    for (size_t i = 0; i < ranks.size(); ++i) memory[i] = ranks[i]->memory();
  return Status::ok();
}

class EngineImpl final : public Engine {
 public:
  explicit EngineImpl(std::shared_ptr<Core> core) : core_(std::move(core)), thread_([core = core_] { core->serve(); }) {}
  ~EngineImpl() override { close(); }

  Status load(std::span<const FileDesc> files, std::span<const TensorSlice> slices,
              const std::function<void(uint64_t, uint64_t)>& progress, const std::atomic<bool>& cancel) override;
  Status connect(std::shared_ptr<Comm> comm) override { return core_->connect(std::move(comm)); }
  Status kv_init(uint32_t blocks) override;
  Status stage(const ExpertMap& map, std::span<const FileDesc> files, std::span<const TensorSlice> slices, const std::atomic<bool>& cancel) override;
  Status launch(const Step& step, std::function<void(StepResult&&)> done) override;
  const std::string& numerics_id() const override { return core_->numerics_id; }
  std::vector<Memory> memory() const override {
    std::lock_guard lock(core_->mutex);
    return core_->memory;
  }
  EngineStats stats() const override {
    std::lock_guard lock(core_->mutex);
    return {core_->expert_tokens};
  }
  void close() override;

 private:
  Status stage_on_ranks(const ExpertMap& map, std::span<const FileDesc> files, std::span<const TensorSlice> slices, const std::atomic<bool>& cancel);
  Status read(std::span<const FileDesc> files, std::span<const TensorSlice> slices,
              const std::function<void(uint64_t, uint64_t)>& progress, const std::atomic<bool>& cancel);
  Status admit(const Step& step, std::function<void(StepResult&&)> done);
  std::shared_ptr<Core> core_;
  std::thread thread_;
  std::mutex staging_;
  std::atomic<bool> loaded_{false}, closed_{false};
};

Status EngineImpl::load(std::span<const FileDesc> files, std::span<const TensorSlice> slices,
                        const std::function<void(uint64_t, uint64_t)>& progress, const std::atomic<bool>& cancel) {
  return guarded("load", [&] { return read(files, slices, progress, cancel); });
}

Status EngineImpl::read(std::span<const FileDesc> files, std::span<const TensorSlice> slices,
                        const std::function<void(uint64_t, uint64_t)>& progress, const std::atomic<bool>& cancel) {
  Core& core = *core_;
  if (loaded_) return Status::invalid("load", "the engine is loaded");
  ModelFiles open;
  MUSTER_TRY(open.open(files));
  uint64_t total = 0;
  for (const TensorSlice& slice : slices) {
    const bool local = std::ranges::any_of(core.group.local, [&](const RankShard& shard) { return shard.rank == slice.rank; });
    if (!local) return Status::invalid(slice.name, "is for rank " + std::to_string(slice.rank) + ", which is not of this worker");
  }
  for (const RankShard& shard : core.group.local) MUSTER_TRY(check_slices({&core.model, &shard, &open, slices, {}}, &total));
  std::mutex mutex;
  uint64_t done = 0;
  LoadWatch watch;
  watch.cancel = &cancel;
  watch.advance = [&](uint64_t bytes) {
    std::lock_guard lock(mutex);
    done += bytes;
    if (progress) progress(done, total);
  };
  MUSTER_TRY(core.call([&](RankThreads& threads) {
    return core.on_ranks(threads, [&](LocalRank& rank, size_t) { return rank.load(open, slices, watch); });
  }));
  loaded_ = true;
  return Status::ok();
}

Status EngineImpl::kv_init(uint32_t blocks) {
  Core& core = *core_;
  if (!loaded_) return Status::invalid("kv_init", "load comes first");
  if (core.group.world > 1 && !core.comm) return Status::invalid("comm", "ranks of this group live on other workers: connect comes first");
  if (blocks < 2) return Status::invalid("kv_blocks", std::to_string(blocks) + " blocks; block 0 is padding, so at least 2 are needed");
  return core.call([&](RankThreads& threads) {
    if (core.check) return Status::invalid("kv_init", "was done");
    MUSTER_TRY(core.collective(threads, [&](LocalRank& rank, size_t) { return rank.kv_init({core.group.world, blocks, &rank == core.ranks[0].get()}); }));
    std::lock_guard lock(core.mutex);
    core.numerics_id = core.ranks[0]->numerics_id();
    for (const auto& rank : core.ranks) core.memory.push_back(rank->memory());
    for (const BlockSpec& block : core.model.blocks) core.expert_tokens.emplace_back(block.dense_ffn ? 0 : block.moe.experts, 0);
    core.check = std::make_unique<StepCheck>(StepLimits{core.options, core.model.vocab, core.model.context_tokens, blocks});
    return Status::ok();
  });
}

Status EngineImpl::stage(const ExpertMap& map, std::span<const FileDesc> files, std::span<const TensorSlice> slices, const std::atomic<bool>& cancel) {
  return guarded("stage", [&] { return stage_on_ranks(map, files, slices, cancel); });
}

Status EngineImpl::stage_on_ranks(const ExpertMap& map, std::span<const FileDesc> files, std::span<const TensorSlice> slices, const std::atomic<bool>& cancel) {
  Core& core = *core_;
  std::unique_lock alone(staging_, std::try_to_lock);
  if (!alone.owns_lock()) return Status::invalid("stage", "another map is being staged");
  if (map.version == 0) return Status::invalid("version", "0 is the map of the shards");
  ModelFiles open;
  MUSTER_TRY(open.open(files));
  for (const TensorSlice& slice : slices)
    if (std::ranges::none_of(core.group.local, [&](const RankShard& shard) { return shard.rank == slice.rank; }))
      return Status::invalid(slice.name, "is for rank " + std::to_string(slice.rank) + ", which is not of this worker");
  std::vector<LocalRank::StagedExperts> stages(core.ranks.size());
  // Steps that were launched before may switch to the last map; none may any more from here on.
  MUSTER_TRY(core.call(
      [&](RankThreads&) {
        for (size_t i = 0; i < core.ranks.size(); ++i) MUSTER_TRY(core.ranks[i]->begin_stage(map, &stages[i]));
        return Status::ok();
      },
      [&] {
        if (!core.check) return Status::invalid("stage", "kv_init comes first");
        core.check->stage(0);
        return Status::ok();
      }));
  LoadWatch watch;
  watch.cancel = &cancel;
  watch.advance = [](uint64_t) {};
  for (size_t i = 0; i < core.ranks.size(); ++i) MUSTER_TRY(core.ranks[i]->read_stage(open, slices, watch, &stages[i]));
  return core.call([&](RankThreads&) {
    for (size_t i = 0; i < core.ranks.size(); ++i) core.ranks[i]->take_stage(std::move(stages[i]));
    std::lock_guard lock(core.mutex);
    core.check->stage(map.version);
    return Status::ok();
  });
}

Status EngineImpl::launch(const Step& step, std::function<void(StepResult&&)> done) {
  return guarded("launch", [&] { return admit(step, std::move(done)); });
}

Status EngineImpl::admit(const Step& step, std::function<void(StepResult&&)> done) {
  Core& core = *core_;
  std::lock_guard lock(core.mutex);
  if (core.stopping) return Status::invalid("engine", "is closed");
  if (!core.fault.is_ok()) return core.fault;
  if (!core.check) return Status::invalid("engine", "kv_init comes first");
  if (core.in_flight >= core.options.in_flight_max)
    return Status::invalid("in_flight", std::to_string(core.in_flight) + " steps are in flight, at most " + std::to_string(core.options.in_flight_max));
  MUSTER_TRY(core.check->admit(step));
  ++core.in_flight;
  core.post([&core, step, done = std::move(done)](RankThreads& threads) {
    StepResult result;
    result.epoch = step.epoch;
    result.status = guarded("step", [&] { return core.run_step(threads, step, &result); });
    if (!result.status.is_ok()) core.fail(result.status);
    {
      std::lock_guard lock(core.mutex);
      --core.in_flight;
    }
    done(std::move(result));
  });
  return Status::ok();
}

void EngineImpl::close() {
  if (closed_.exchange(true)) return;
  Core& core = *core_;
  std::unique_lock lock(core.mutex);
  core.stopping = true;
  core.wake.notify_all();
  const auto patience = std::chrono::milliseconds(core.options.stall_give_up_ms);
  if (!core.end.wait_for(lock, patience, [&] { return core.ended; })) {
    if (core.fault.is_ok()) core.fault = Status::internal("close", "the engine was closed while a step was running");
    lock.unlock();
    if (core.comm) core.comm->close();
    lock.lock();
    core.end.wait_for(lock, std::chrono::seconds(1), [&] { return core.ended; });
  }
  const bool ended = core.ended;
  lock.unlock();
  if (core.comm) core.comm->close();
  if (ended) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

Status build(const ModelDesc& model, const GroupDesc& group, const EngineOptions& options, std::shared_ptr<Comm> comm, std::unique_ptr<Engine>* out) {
  MUSTER_TRY(check_model(model));
  MUSTER_TRY(check_group(model, group));
  MUSTER_TRY(check_options(options));
  auto core = std::make_shared<Core>();
  core->model = model;
  core->group = group;
  core->options = options;
  const uint32_t threads = options.threads ? options.threads : devices().cpus;
  core->options.threads = std::max<uint32_t>(1, threads / uint32_t(group.local.size()));
  for (const RankShard& shard : core->group.local) {
    core->ranks.emplace_back();
    MUSTER_TRY(LocalRank::create(core->model, shard, core->options, &core->ranks.back()));
  }
  core->slots = std::make_unique<Slots>(options.slots_max);
  if (!comm && group.world > 1 && group.local.size() == group.world)
    comm = make_peer_comm(group.world, {options.stall_report_ms, options.stall_give_up_ms});
  if (comm) MUSTER_TRY(core->connect(std::move(comm)));
  *out = std::make_unique<EngineImpl>(std::move(core));
  return Status::ok();
}

}  // namespace

Status Engine::create(const ModelDesc& model, const GroupDesc& group, const EngineOptions& options,
                      std::shared_ptr<Comm> comm, std::unique_ptr<Engine>* out) {
  return guarded("create", [&] { return build(model, group, options, std::move(comm), out); });
}

}  // namespace muster
