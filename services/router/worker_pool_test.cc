#include "services/router/worker_pool.h"

#include <gtest/gtest.h>

namespace zeroc {
namespace {

using std::chrono::milliseconds;

v1::WorkerInfo Info(v1::WorkerRole role, const std::string& name) {
  v1::WorkerInfo info;
  info.set_role(role);
  info.set_name(name);
  info.set_grpc_address("127.0.0.1:1234");
  info.set_model_fingerprint("model");
  info.set_plan_id("plan");
  return info;
}
v1::WorkerInfo DecodeInfo(const std::string& name) { return Info(v1::WORKER_ROLE_DECODE, name); }
v1::WorkerInfo PrefillInfo(const std::string& name) { return Info(v1::WORKER_ROLE_PREFILL, name); }

v1::WorkerLoad Free(std::uint64_t kv_bytes_free) {
  v1::WorkerLoad load;
  load.set_kv_bytes_free(kv_bytes_free);
  return load;
}

class WorkerPoolTest : public testing::Test {
 protected:
  WorkerPool::Time At(int ms) const { return WorkerPool::Time() + milliseconds(ms); }
  std::string Decode(WorkerPool::Choice choice = {}) {
    const Result<WorkerPool::Ref> ref = pool_.PickDecode(std::move(choice));
    return ref.ok() ? ref->name() : ref.status().ToString();
  }
  WorkerPool pool_{"model", "plan", milliseconds(5000)};
};

TEST_F(WorkerPoolTest, RefusesStrangers) {
  EXPECT_TRUE(pool_.CheckInfo(DecodeInfo("d")).ok());
  v1::WorkerInfo other = DecodeInfo("d");
  other.set_model_fingerprint("another");
  EXPECT_EQ(pool_.CheckInfo(other).code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(pool_.CheckInfo(other).message().find("another"), std::string_view::npos);
  other = DecodeInfo("d");
  other.set_plan_id("old plan");
  EXPECT_EQ(pool_.CheckInfo(other).code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(pool_.CheckInfo(v1::WorkerInfo()).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pool_.CheckInfo(DecodeInfo("a b")).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(pool_.CheckInfo(DecodeInfo(std::string(200, 'x'))).code(), StatusCode::kInvalidArgument);
  for (const char* address : {"", "host", "host:0", "host:x"}) {
    other = DecodeInfo("d");
    other.set_grpc_address(address);
    EXPECT_EQ(pool_.CheckInfo(other).code(), StatusCode::kInvalidArgument) << address;
  }
}

TEST_F(WorkerPoolTest, IsReadyWithBothRoles) {
  EXPECT_EQ(pool_.Ready().message(), "not ready: no prefill worker, no decode worker");
  const WorkerId decode = pool_.Add(DecodeInfo("d"), {}, nullptr, At(0));
  EXPECT_EQ(pool_.Ready().message(), "not ready: no prefill worker");
  pool_.Add(PrefillInfo("p"), {}, nullptr, At(0));
  EXPECT_TRUE(pool_.Ready().ok());
  v1::WorkerLoad draining;
  draining.set_draining(true);
  EXPECT_TRUE(pool_.Update(decode, draining, At(1)));
  EXPECT_FALSE(pool_.Ready().ok());
  EXPECT_EQ(Decode(), "UNAVAILABLE: no decode worker takes requests: 1 draining");
}

TEST_F(WorkerPoolTest, PicksTheFreestDecodeWorkerAndSpreadsTies) {
  pool_.Add(DecodeInfo("small"), Free(10), nullptr, At(0));
  const WorkerId big = pool_.Add(DecodeInfo("big"), Free(20), nullptr, At(0));
  EXPECT_EQ(Decode(), "big");
  WorkerPool::Choice other;
  other.excluded = {"big"};
  EXPECT_EQ(Decode(other), "small");
  other.excluded.insert("small");
  EXPECT_EQ(Decode(other), "UNAVAILABLE: no decode worker is left to try");
  pool_.Update(big, Free(10), At(1));
  Result<WorkerPool::Ref> first = pool_.PickDecode({});
  Result<WorkerPool::Ref> second = pool_.PickDecode({});
  EXPECT_NE(first->name(), second->name());
}

TEST_F(WorkerPoolTest, PicksThePrefillWorkerWithTheLeastToDo) {
  const WorkerId a = pool_.Add(PrefillInfo("a"), {}, nullptr, At(0));
  pool_.Add(PrefillInfo("b"), {}, nullptr, At(0));
  v1::WorkerLoad busy;
  busy.set_waiting_tokens(1000);
  pool_.Update(a, busy, At(1));
  WorkerPool::Choice choice;
  choice.n_tokens = 600;
  Result<WorkerPool::Ref> first = pool_.PickPrefill(choice);
  EXPECT_EQ(first->name(), "b");
  Result<WorkerPool::Ref> second = pool_.PickPrefill(choice);
  EXPECT_EQ(second->name(), "b") << "600 assigned against 1000 reported";
  EXPECT_EQ(pool_.PickPrefill(choice)->name(), "a") << "1200 assigned since the heartbeat";
  first->Reset();
  EXPECT_EQ(pool_.PickPrefill(choice)->name(), "b") << "a finished request's share is returned";
}

TEST_F(WorkerPoolTest, SkipsWorkersThatCouldNeverHoldTheRequest) {
  v1::WorkerInfo info = DecodeInfo("d");
  info.set_max_tokens(100);
  pool_.Add(info, Free(10), nullptr, At(0));
  WorkerPool::Choice choice;
  choice.n_tokens = 101;
  EXPECT_EQ(Decode(choice), "UNAVAILABLE: no decode worker can hold 101 tokens");
  choice.n_tokens = 100;
  EXPECT_EQ(Decode(choice), "d");
}

TEST_F(WorkerPoolTest, SilenceExpiresAWorkerAndTellsItsRequestsOnce) {
  const WorkerId d1 = pool_.Add(DecodeInfo("d1"), Free(9), nullptr, At(0));
  const WorkerId d2 = pool_.Add(DecodeInfo("d2"), Free(1), nullptr, At(0));
  int lost = 0, lost_returned = 0;
  WorkerPool::Choice choice;
  choice.on_lost = [&] { ++lost; };
  Result<WorkerPool::Ref> held = pool_.PickDecode(choice);
  choice.on_lost = [&] { ++lost_returned; };
  pool_.PickDecode(choice)->Reset();
  EXPECT_TRUE(pool_.Update(d2, Free(1), At(4000)));
  EXPECT_TRUE(pool_.Expire(At(5000)).empty());
  EXPECT_EQ(pool_.Expire(At(5001)), std::vector<std::string>{"d1"});
  EXPECT_EQ(lost, 1);
  EXPECT_EQ(lost_returned, 0) << "a request that is over hears nothing";
  EXPECT_FALSE(pool_.Update(d1, Free(9), At(5002))) << "it has to register again";
  EXPECT_EQ(Decode(), "d2");
  EXPECT_TRUE(pool_.Expire(At(5003)).empty());
  held->Reset();  // of a worker that is gone
  EXPECT_EQ(pool_.Count(v1::WORKER_ROLE_DECODE), 1U);
}

TEST_F(WorkerPoolTest, ANewStreamReplacesTheOldOneOfTheSameName) {
  const WorkerId old_stream = pool_.Add(DecodeInfo("d"), Free(1), nullptr, At(0));
  pool_.Add(DecodeInfo("d"), Free(2), nullptr, At(1));
  pool_.Add(PrefillInfo("d"), {}, nullptr, At(1));
  EXPECT_EQ(pool_.Count(v1::WORKER_ROLE_DECODE), 1U);
  EXPECT_EQ(pool_.Count(v1::WORKER_ROLE_PREFILL), 1U);
  EXPECT_FALSE(pool_.Update(old_stream, Free(1), At(2)));
  pool_.Remove(old_stream);  // the old stream's end comes late and must not take the new one
  EXPECT_EQ(Decode(), "d");
}

TEST_F(WorkerPoolTest, RemovalAloneDoesNotFailRequests) {
  const WorkerId id = pool_.Add(DecodeInfo("d"), Free(1), nullptr, At(0));
  int lost = 0;
  WorkerPool::Choice choice;
  choice.on_lost = [&] { ++lost; };
  Result<WorkerPool::Ref> held = pool_.PickDecode(choice);
  pool_.Remove(id);
  pool_.Expire(At(60'000));
  EXPECT_EQ(lost, 0);
}

}  // namespace
}  // namespace zeroc
