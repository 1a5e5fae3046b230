// The fixture of the flow's tests: a router with one scripted prefill worker and one scripted decode worker.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "services/common/timer_thread.h"
#include "services/router/request_flow.h"
#include "services/router/test_router.h"

namespace zeroc {

class RequestFlowTest : public testing::Test {
 protected:
  // queue_round: how often waiting requests get a turn.
  explicit RequestFlowTest(FlowConfig config = MakeConfig(),
                           std::chrono::milliseconds queue_round = std::chrono::milliseconds(20))
      : queue_(std::make_shared<AdmissionQueue>(MakeQueueConfig(queue_round), timers_, metrics_)),
        context_{model_, pool_, metrics_, timers_, estimates_, *queue_, audit_, config} {
    AddWorker(v1::WORKER_ROLE_PREFILL, "p", prefill_, 0);
    AddWorker(v1::WORKER_ROLE_DECODE, "d", decode_, 100);
  }
  // Calls that the test left open hold flows that hold the workers.
  ~RequestFlowTest() override {
    router_.CancelAll(Cancelled("the test is over"));
    (void)router_.WaitIdle(std::chrono::seconds(1));
    for (const auto& worker : workers_) worker->HangUp();
  }
  static FlowConfig MakeConfig() {
    FlowConfig config;
    config.limits.vocab_size = 300;
    config.limits.max_positions = 1000;
    config.stats_timeout = std::chrono::milliseconds(50);
    config.held_failure_timeout = std::chrono::milliseconds(50);
    config.retry_delay = std::chrono::milliseconds(20);
    config.queue_timeout = std::chrono::seconds(30);
    return config;
  }
  static AdmissionQueue::Config MakeQueueConfig(std::chrono::milliseconds round) {
    AdmissionQueue::Config config;
    config.waiting_max = 2;
    config.round = round;
    return config;
  }
  void AddWorker(v1::WorkerRole role, const std::string& name, const std::shared_ptr<ScriptedWorker>& worker,
                 std::uint64_t kv_bytes_free, const std::vector<std::uint64_t>& prefix_hashes = {}) {
    v1::WorkerInfo info;
    info.set_role(role);
    info.set_name(name);
    v1::WorkerLoad load;
    load.set_kv_bytes_free(kv_bytes_free);
    load.mutable_prefix_hashes()->Assign(prefix_hashes.begin(), prefix_hashes.end());
    pool_.Add(info, load, worker, WorkerPool::Time::clock::now());
    workers_.push_back(worker);
  }
  std::shared_ptr<RequestFlow> Start(v1::GenerateRequest request) {
    flow_ = router_.Generate(std::move(request), std::nullopt, sink_);
    return flow_;
  }
  template <typename Condition>
  static bool WaitFor(Condition condition) {
    for (int i = 0; i < 1000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return condition();
  }
  // The flow has ended, once, and nothing of it is left anywhere.
  void ExpectClean(int releases) {
    EXPECT_EQ(sink_->ends, 1) << sink_->events;
    EXPECT_EQ(router_.in_flight(), 0U);
    EXPECT_EQ(decode_->releases.size(), static_cast<std::size_t>(releases));
    for (const v1::ReleaseRequest& release : decode_->releases) {
      EXPECT_EQ(release.lease_id(), 7U);
      EXPECT_EQ(release.generation(), 70U);
    }
  }
  // Late events of workers that have not heard yet: all must be ignored.
  void PokeAfterTheEnd() {
    const std::string before = sink_->events;
    if (prefill_->prefill_event) prefill_->FirstToken('z');
    if (prefill_->prefill_event) prefill_->Transferred();
    if (decode_->decode_event) decode_->Tokens("zz");
    if (prefill_->prefill_done) prefill_->EndPrefill(Cancelled("cancelled"));
    if (decode_->decode_done) decode_->EndDecode(Cancelled("cancelled"));
    flow_->Cancel(Cancelled("again"));
    EXPECT_EQ(sink_->events, before);
  }

  ServedModel model_ = TestModel();
  Metrics metrics_{"test-model"};
  TimerThread timers_;
  WorkerPool pool_{"model", "plan", std::chrono::milliseconds(5000)};
  Estimates estimates_;
  std::shared_ptr<AdmissionQueue> queue_;
  Audit audit_{{/*share=*/0}, model_.ladder, model_.ppl_base, 1};
  FlowContext context_;
  Router router_{context_, 4};
  std::shared_ptr<ScriptedWorker> prefill_ = std::make_shared<ScriptedWorker>();
  std::shared_ptr<ScriptedWorker> decode_ = std::make_shared<ScriptedWorker>();
  std::shared_ptr<RecordingSink> sink_ = std::make_shared<RecordingSink>();
  std::shared_ptr<RequestFlow> flow_;
  std::vector<std::shared_ptr<ScriptedWorker>> workers_;  // all that the test added
};

}  // namespace zeroc
