// A prefill group of three workers and a decode worker in one process, over gRPC and the loopback transport, with the
// demo model: the tokens of a single process, and every block back whatever happens to a rank.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "libzeroc/comm/loopback_transport.h"
#include "libzeroc/engine/local_generator.h"
#include "services/common/grpc_server.h"
#include "services/decode/decode_rpc.h"
#include "services/prefill/prefill_rpc.h"
#include "services/prefill/worker_pair_testing.h"

namespace zeroc {
namespace {

using namespace testing;  // NOLINT: the demo model and its prompts

constexpr int kRanks = 3;
// A share that nobody wants any more ends with the layer that it computes: long, in instrumented programs.
constexpr int kEndsS = 90;

class Worker {
 public:
  Worker(const PrefillCore::Options& options, const TransportFactory& transport, const std::string& listen)
      : model_(Must(WorkerModel::Open(kModelDir, "", 1))) {
    auto core = Must(PrefillCore::Create(options, *model_, metrics_, transport));
    core_ = core.get();
    service_ = MakePrefillService(std::move(core));
    server_ = Must(GrpcServer::Start(listen, GrpcLimits(), {service_->service()}));
  }
  ~Worker() {
    StopServing();
    service_.reset();
  }
  void StopServing() { server_->Shutdown(milliseconds(200)); }
  PrefillCore& core() { return *core_; }
  std::string address() const { return "127.0.0.1:" + std::to_string(server_->port()); }
  std::string page() {
    core_->UpdateGauges(metrics_);
    return metrics_.Render();
  }

 private:
  std::unique_ptr<WorkerModel> model_;
  Metrics metrics_{"test"};
  std::unique_ptr<WorkerService> service_;
  PrefillCore* core_ = nullptr;
  std::unique_ptr<GrpcServer> server_;
};

struct Answer {
  grpc::Status prefill, decode;
  std::vector<std::int32_t> ids;
  v1::PrefillDone done;
};

class PrefillGroupTest : public ::testing::Test {
 protected:
  void Start(SpScheme scheme, milliseconds patience = milliseconds(60'000)) {
    DecodeCore::Options decode;
    decode.kv_bytes = 96 << 20;
    auto core = Must(DecodeCore::Create(decode, *TheModels().decode, decode_metrics_, Transport("decode")));
    decode_ = core.get();
    decode_service_ = MakeDecodeService(std::move(core));
    decode_server_ = Must(GrpcServer::Start("127.0.0.1:0", GrpcLimits(), {decode_service_->service()}));
    decode_stub_ =
        v1::Decode::NewStub(MakeGrpcChannel("127.0.0.1:" + std::to_string(decode_server_->port()), GrpcLimits()));
    PrefillCore::Options options = Options("leader");
    options.group.scheme = scheme;
    options.group.patience = patience;
    options.group.retry = milliseconds(50);
    for (int rank = 1; rank < kRanks; ++rank) {
      StartFollower("127.0.0.1:0");
      options.group.followers.push_back(followers_.back()->address());
    }
    leader_ = std::make_unique<Worker>(options, Transport("leader"), "127.0.0.1:0");
    prefill_stub_ = v1::Prefill::NewStub(MakeGrpcChannel(leader_->address(), GrpcLimits()));
  }
  void StartFollower(const std::string& listen) {
    followers_.push_back(std::make_unique<Worker>(Options("follower"), Transport("follower"), listen));
  }
  ~PrefillGroupTest() override { Stop(); }
  void Stop() {
    leader_.reset();
    followers_.clear();
    if (decode_server_ != nullptr) decode_server_->Shutdown(milliseconds(200));
    decode_server_.reset();
    decode_service_.reset();
  }
  // As its peers see it the process is gone; what it was computing ends.
  void Lose(std::size_t follower_idx) {
    Worker& lost = *followers_[follower_idx];
    lost.StopServing();
    const auto until = std::chrono::steady_clock::now() + seconds(kEndsS);
    while (lost.core().in_flight() > 0) {
      ASSERT_LT(std::chrono::steady_clock::now(), until) << "a share of the lost follower does not end";
      std::this_thread::sleep_for(milliseconds(5));
    }
    followers_.erase(followers_.begin() + static_cast<std::ptrdiff_t>(follower_idx));
  }

  static PrefillCore::Options Options(const std::string& name) {
    PrefillCore::Options options;
    options.kv_bytes = 96 << 20;
    options.chunk_tokens = 128;
    options.name = name;
    return options;
  }

  bool FormsWithin(int n_seconds) {
    const auto until = std::chrono::steady_clock::now() + seconds(n_seconds);
    while (leader_->core().group()->ready_ranks() != kRanks) {
      if (std::chrono::steady_clock::now() > until) return false;
      std::this_thread::sleep_for(milliseconds(5));
    }
    return true;
  }

  // `during` runs on a thread of its own once prefill has the request.
  Answer Run(const std::vector<std::int32_t>& prompt, const std::string& profile, int n_ranks,
             const std::function<void()>& during = nullptr) {
    constexpr std::uint32_t kMaxTokens = 8;
    Answer answer;
    v1::ReserveRequest reserve;
    reserve.set_request_id("request-" + std::to_string(++n_requests_));
    reserve.set_attempt(1);
    reserve.set_n_prompt_tokens(static_cast<std::uint32_t>(prompt.size()));
    reserve.set_max_tokens(kMaxTokens);
    reserve.set_profile(profile);
    reserve.set_plan_id(TheModels().decode->plan_id());
    reserve.set_model_fingerprint(TheModels().decode->fingerprint());
    v1::ReserveResponse reserved;
    {
      grpc::ClientContext context;
      answer.decode = decode_stub_->Reserve(&context, reserve, &reserved);
      if (!answer.decode.ok()) return answer;
    }
    v1::DecodeRequest decode;
    decode.set_lease_id(reserved.lease().lease_id());
    decode.set_generation(reserved.lease().generation());
    decode.set_request_id(reserve.request_id());
    *decode.mutable_sampling() = Sampling(kMaxTokens);
    decode.set_n_prompt_tokens(reserve.n_prompt_tokens());
    v1::PrefillRequest prefill = Cluster::PrefillFor(reserve, reserved.lease(), prompt, Sampling(kMaxTokens));
    prefill.set_sp_ranks(static_cast<std::uint32_t>(n_ranks));

    grpc::ClientContext prefill_context, decode_context;
    for (grpc::ClientContext* context : {&prefill_context, &decode_context}) {
      context->set_deadline(std::chrono::system_clock::now() + seconds(100));
    }
    const auto decode_stream = decode_stub_->Generate(&decode_context, decode);
    std::vector<std::int32_t> later;
    std::thread prefill_thread([&] {
      const auto stream = prefill_stub_->Run(&prefill_context, prefill);
      std::thread meanwhile;
      if (during) meanwhile = std::thread(during);
      v1::PrefillEvent event;
      while (stream->Read(&event)) {
        if (event.has_first_token()) answer.ids.push_back(static_cast<std::int32_t>(event.first_token().id()));
        if (event.has_done()) answer.done = event.done();
      }
      answer.prefill = stream->Finish();
      if (!answer.prefill.ok()) decode_context.TryCancel();
      if (meanwhile.joinable()) meanwhile.join();
    });
    v1::DecodeEvent event;
    while (decode_stream->Read(&event)) {
      for (const std::uint32_t id : event.tokens().ids()) later.push_back(static_cast<std::int32_t>(id));
    }
    answer.decode = decode_stream->Finish();
    prefill_thread.join();
    answer.ids.insert(answer.ids.end(), later.begin(), later.end());
    grpc::ClientContext context;
    v1::ReleaseRequest release;
    v1::ReleaseResponse response;
    release.set_lease_id(reserved.lease().lease_id());
    release.set_generation(reserved.lease().generation());
    release.set_request_id(reserve.request_id());
    EXPECT_TRUE(decode_stub_->Release(&context, release, &response).ok());
    return answer;
  }

  ::testing::AssertionResult Settles() {
    const auto until = std::chrono::steady_clock::now() + seconds(kEndsS);
    for (;;) {
      std::uint64_t n_blocks = decode_->usage().n_blocks_used + leader_->core().usage().n_blocks_used;
      std::size_t n_requests = decode_->in_flight() + leader_->core().in_flight();
      for (const auto& follower : followers_) {
        n_blocks += follower->core().usage().n_blocks_used;
        n_requests += follower->core().in_flight();
      }
      if (n_blocks + n_requests == 0) return ::testing::AssertionSuccess();
      if (std::chrono::steady_clock::now() > until) {
        return ::testing::AssertionFailure() << n_blocks << " blocks of " << n_requests << " requests are held";
      }
      std::this_thread::sleep_for(milliseconds(10));
    }
  }

  static std::vector<std::int32_t> Alone(const std::vector<std::int32_t>& prompt, const std::string& profile) {
    SamplingParams sampling;
    sampling.max_tokens = 8;
    sampling.temperature = 0;
    sampling.ignore_eos = true;
    return Must(GenerateLocally(TheModels().alone->model(), TheModels().alone->formats().at(profile), prompt, sampling,
                                nullptr, 128))
        .ids;
  }

  TransportFactory Transport(const std::string& name) {
    return [this, name](TransportListener& listener) -> Result<std::unique_ptr<zeroc::Transport>> {
      TransportOptions options;
      options.name = name;
      auto transport = LoopbackTransport::Create(options, listener, hub_, Delivery::kActiveMessage);
      if (!transport.ok()) return transport.status();
      return std::unique_ptr<zeroc::Transport>(std::move(*transport));
    };
  }

  std::unique_ptr<Worker> leader_;
  std::vector<std::unique_ptr<Worker>> followers_;

 private:
  std::shared_ptr<LoopbackHub> hub_ = std::make_shared<LoopbackHub>();
  Metrics decode_metrics_{"test"};
  std::unique_ptr<WorkerService> decode_service_;
  DecodeCore* decode_ = nullptr;
  std::unique_ptr<GrpcServer> decode_server_;
  std::unique_ptr<v1::Decode::Stub> decode_stub_;
  std::unique_ptr<v1::Prefill::Stub> prefill_stub_;
  int n_requests_ = 0;
};

TEST_F(PrefillGroupTest, GivesTheTokensOfASingleProcess) {
  using Prompts = std::vector<std::pair<int, std::string>>;
  const std::pair<SpScheme, Prompts> all[] = {{SpScheme::kAuto, {{700, "q4"}, {1100, "z2"}, {300, "q4"}, {1, "q4"}}},
                                              {SpScheme::kUlysses, {{700, "bf16"}, {300, "q4"}}}};
  for (const auto& [scheme, prompts] : all) {
    Stop();
    Start(scheme);
    ASSERT_TRUE(FormsWithin(kSettleS));
    for (const auto& [n_tokens, profile] : prompts) {
      SCOPED_TRACE(std::string(SpSchemeName(scheme)) + " " + profile + " " + std::to_string(n_tokens));
      const std::vector<std::int32_t> prompt = Prompt(n_tokens);
      const Answer answer = Run(prompt, profile, kRanks);
      ASSERT_TRUE(answer.prefill.ok()) << answer.prefill.error_message();
      ASSERT_TRUE(answer.decode.ok()) << answer.decode.error_message();
      EXPECT_EQ(answer.ids, Alone(prompt, profile));
      EXPECT_EQ(answer.done.sp_ranks(), static_cast<unsigned>(kRanks));
      EXPECT_EQ(answer.done.sp_scheme(), scheme == SpScheme::kAuto ? "allgather" : SpSchemeName(scheme));
      // In a short prompt rank 0 has nothing but the end, which nobody else sees.
      EXPECT_TRUE(answer.done.sp_bytes() > 0 || n_tokens <= 300);
      EXPECT_EQ(answer.done.kv_bytes().wire(), answer.done.kv_bytes().packed());
      EXPECT_TRUE(Settles());
    }
    const std::string series = scheme == SpScheme::kAuto ? "{scheme=\"allgather\"}" : "{scheme=\"ulysses\"}";
    EXPECT_NE(followers_[1]->page().find("zeroc_sp_bytes_total" + series), std::string::npos);
    EXPECT_EQ(followers_[1]->page().find("zeroc_sp_bytes_total" + series + " 0\n"), std::string::npos);
    // And a prompt of its own beside them.
    EXPECT_EQ(Run(Prompt(300), "q4", 1).ids, Alone(Prompt(300), "q4"));
    EXPECT_TRUE(Settles());
  }
}

TEST_F(PrefillGroupTest, ALostFollowerEndsThePromptAndTheGroupFormsAgain) {
  Start(SpScheme::kAllGather);
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(FormsWithin(kSettleS));
    const std::string address = followers_[0]->address();
    const Answer answer = Run(Prompt(1500), "q4", kRanks, [&] {
      std::this_thread::sleep_for(milliseconds(round * 40));
      Lose(0);
    });
    if (!answer.prefill.ok()) {
      EXPECT_TRUE(answer.prefill.error_code() == grpc::StatusCode::UNAVAILABLE ||
                  answer.prefill.error_code() == grpc::StatusCode::ABORTED ||
                  answer.prefill.error_code() == grpc::StatusCode::CANCELLED)
          << answer.prefill.error_code() << " " << answer.prefill.error_message();
    }
    EXPECT_TRUE(Settles());
    // Alone until the rank is back, on its address.
    EXPECT_EQ(Run(Prompt(300), "q4", 1).ids, Alone(Prompt(300), "q4"));
    followers_.insert(followers_.begin(),
                      std::make_unique<Worker>(Options("follower"), Transport("follower"), address));
    ASSERT_TRUE(FormsWithin(kSettleS));
    EXPECT_EQ(Run(Prompt(700), "q4", kRanks).ids, Alone(Prompt(700), "q4"));
    EXPECT_TRUE(Settles());
  }
}

TEST_F(PrefillGroupTest, WhatTheGroupCannotDoIsRefused) {
  Start(SpScheme::kAuto);
  ASSERT_TRUE(FormsWithin(kSettleS));
  EXPECT_EQ(Run(Prompt(300), "q4", 2).prefill.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  Lose(1);
  // As soon as the loss is known.
  grpc::Status status;
  for (int i = 0; i < 200 && status.ok(); ++i) status = Run(Prompt(70), "q4", kRanks).prefill;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
  EXPECT_TRUE(Settles());
  EXPECT_EQ(Run(Prompt(300), "q4", 1).ids, Alone(Prompt(300), "q4"));
}

TEST_F(PrefillGroupTest, AFollowerWithoutRoomEndsThePromptWithItsReason) {
  Start(SpScheme::kAllGather);
  PrefillCore::Options small = Options("small");
  small.kv_bytes = 3 << 20;  // 1700 tokens in bf16 are more
  const std::string address = followers_[1]->address();
  Lose(1);
  followers_.push_back(std::make_unique<Worker>(small, Transport("small"), address));
  std::this_thread::sleep_for(milliseconds(100));
  ASSERT_TRUE(FormsWithin(kSettleS));
  const Answer answer = Run(Prompt(1700), "bf16", kRanks);
  EXPECT_EQ(answer.prefill.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << answer.prefill.error_message();
  EXPECT_TRUE(Settles());
  ASSERT_TRUE(FormsWithin(kSettleS));
  EXPECT_EQ(Run(Prompt(300), "q4", kRanks).ids, Alone(Prompt(300), "q4"));
  EXPECT_TRUE(Settles());
}

}  // namespace
}  // namespace zeroc
