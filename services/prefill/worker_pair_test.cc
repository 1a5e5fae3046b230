// A prefill and a decode worker in one process, over gRPC on loopback and the KV transport, with the demo model: the
// tokens of a single process, the bytes that were computed, and every block back whatever happens.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <random>
#include <thread>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/loopback_transport.h"
#include "libzeroc/comm/ucx/ucx_transport.h"
#include "libzeroc/engine/local_generator.h"
#include "services/common/grpc_server.h"
#include "services/decode/decode_rpc.h"
#include "services/prefill/prefill_rpc.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr char kModelDir[] = "models/zeroc-demo";
constexpr char kDecodeName[] = "decode-under-test";
constexpr int kSettleS = 15;

enum class Wire { kLoopbackAm, kLoopbackPut, kUcxTcp };

std::string WireName(Wire wire) {
  return wire == Wire::kLoopbackAm ? "LoopbackAm" : wire == Wire::kLoopbackPut ? "LoopbackPut" : "UcxTcp";
}

template <typename T>
T Must(Result<T> result) {
  ZEROC_CHECK(result.ok(), result.status().ToString());
  return std::move(*result);
}

// Opened once: the two workers of every test, and the single process that they are held against.
struct Models {
  std::unique_ptr<WorkerModel> decode = Must(WorkerModel::Open(kModelDir, "", 1));
  std::unique_ptr<WorkerModel> prefill = Must(WorkerModel::Open(kModelDir, "", 1));
  std::unique_ptr<WorkerModel> alone = Must(WorkerModel::Open(kModelDir, "", 1));
};
Models& TheModels() {
  static Models models;
  return models;
}

struct Outcome {
  std::vector<std::int32_t> ids;
  grpc::Status prefill, decode;
  v1::FirstToken first;
  v1::PrefillDone done;
  v1::Admitted admitted;
  v1::DecodeFinal final;
  int n_dones = 0, n_admitted = 0, n_finals = 0;
};

class Cluster {
 public:
  explicit Cluster(Wire wire, std::int64_t lease_expiry_ms = 30'000, std::uint64_t decode_kv_bytes = 96 << 20)
      : wire_(wire) {
    DecodeCore::Options decode;
    decode.kv_bytes = decode_kv_bytes;
    decode.lease_expiry_ms = lease_expiry_ms;
    auto decode_core = Must(DecodeCore::Create(decode, *TheModels().decode, decode_metrics_, Factory(kDecodeName)));
    decode_core_ = decode_core.get();
    decode_service_ = MakeDecodeService(std::move(decode_core));
    PrefillCore::Options prefill;
    prefill.kv_bytes = 96 << 20;
    prefill.chunk_tokens = 128;
    auto prefill_core =
        Must(PrefillCore::Create(prefill, *TheModels().prefill, prefill_metrics_, Factory("prefill-under-test")));
    prefill_core_ = prefill_core.get();
    prefill_service_ = MakePrefillService(std::move(prefill_core));
    decode_server_ = Must(GrpcServer::Start("127.0.0.1:0", GrpcLimits(), {decode_service_->service()}));
    prefill_server_ = Must(GrpcServer::Start("127.0.0.1:0", GrpcLimits(), {prefill_service_->service()}));
    const auto channel = [](int port) { return MakeGrpcChannel("127.0.0.1:" + std::to_string(port), GrpcLimits()); };
    decode_stub_ = v1::Decode::NewStub(channel(decode_server_->port()));
    prefill_stub_ = v1::Prefill::NewStub(channel(prefill_server_->port()));
  }
  ~Cluster() {
    prefill_server_->Shutdown(milliseconds(500));
    decode_server_->Shutdown(milliseconds(500));
    prefill_service_.reset();  // says good-bye to decode
  }

  DecodeCore& decode() { return *decode_core_; }
  PrefillCore& prefill() { return *prefill_core_; }
  v1::Decode::Stub& decode_stub() { return *decode_stub_; }
  Metrics& decode_metrics() { return decode_metrics_; }

  v1::ReserveRequest ReserveFor(int n_tokens, int max_tokens, const std::string& profile) {
    v1::ReserveRequest request;
    request.set_request_id("request-" + std::to_string(++n_requests_));
    request.set_attempt(1);
    request.set_n_prompt_tokens(static_cast<std::uint32_t>(n_tokens));
    request.set_max_tokens(static_cast<std::uint32_t>(max_tokens));
    request.set_profile(profile);
    request.set_plan_id(TheModels().decode->plan_id());
    request.set_model_fingerprint(TheModels().decode->fingerprint());
    return request;
  }
  grpc::Status Reserve(const v1::ReserveRequest& request, v1::Lease* lease) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(kSettleS));
    v1::ReserveResponse response;
    const grpc::Status status = decode_stub_->Reserve(&context, request, &response);
    *lease = response.lease();
    return status;
  }

  // Both calls of one request; `on_event` sees each event's name as it comes and may act on the contexts.
  using OnEvent =
      std::function<void(const std::string& event, grpc::ClientContext& prefill, grpc::ClientContext& decode)>;
  Outcome Run(const v1::ReserveRequest& reserve, const v1::Lease& lease, const std::vector<std::int32_t>& prompt,
              const v1::SamplingParams& sampling, const OnEvent& on_event = nullptr) {
    Outcome outcome;
    v1::DecodeRequest decode;
    decode.set_lease_id(lease.lease_id());
    decode.set_generation(lease.generation());
    decode.set_request_id(reserve.request_id());
    *decode.mutable_sampling() = sampling;
    decode.set_n_prompt_tokens(static_cast<std::uint32_t>(prompt.size()));
    v1::PrefillRequest prefill;
    prefill.set_request_id(reserve.request_id());
    prefill.set_attempt(1);
    prefill.mutable_token_ids()->Assign(prompt.begin(), prompt.end());
    *prefill.mutable_sampling() = sampling;
    prefill.set_profile(reserve.profile());
    prefill.set_plan_id(reserve.plan_id());
    prefill.set_model_fingerprint(reserve.model_fingerprint());
    *prefill.mutable_lease() = lease;
    prefill.set_decode_worker(kDecodeName);

    grpc::ClientContext prefill_context, decode_context;
    prefill_context.set_deadline(std::chrono::system_clock::now() + seconds(60));
    decode_context.set_deadline(std::chrono::system_clock::now() + seconds(60));
    const auto tell = [&](const std::string& event) {
      if (on_event) on_event(event, prefill_context, decode_context);
    };
    const auto decode_stream = decode_stub_->Generate(&decode_context, decode);
    std::thread prefill_thread([&] {
      const auto stream = prefill_stub_->Run(&prefill_context, prefill);
      tell("started");
      v1::PrefillEvent event;
      while (stream->Read(&event)) {
        if (event.has_first_token()) outcome.first = event.first_token();
        if (event.has_done()) outcome.done = event.done();
        outcome.n_dones += event.has_done() ? 1 : 0;
        tell(event.has_done() ? "done" : "first_token");
      }
      outcome.prefill = stream->Finish();
      // As the router does: without prefill, or with nothing left to do, decode need not wait.
      if (!outcome.prefill.ok() || outcome.first.finish_reason() != v1::FINISH_REASON_UNSPECIFIED)
        decode_context.TryCancel();
    });
    v1::DecodeEvent event;
    std::vector<std::int32_t> later;
    while (decode_stream->Read(&event)) {
      for (const std::uint32_t id : event.tokens().ids()) later.push_back(static_cast<std::int32_t>(id));
      if (event.has_admitted()) outcome.admitted = event.admitted();
      if (event.has_final()) outcome.final = event.final();
      outcome.n_admitted += event.has_admitted() ? 1 : 0;
      outcome.n_finals += event.has_final() ? 1 : 0;
      tell(event.has_admitted() ? "admitted" : event.has_final() ? "final" : "token");
    }
    outcome.decode = decode_stream->Finish();
    prefill_thread.join();
    // As the router does: a call that was cancelled early may never have reached the worker.
    if (outcome.n_finals == 0) {
      grpc::ClientContext context;
      v1::ReleaseRequest release;
      v1::ReleaseResponse response;
      release.set_lease_id(lease.lease_id());
      release.set_generation(lease.generation());
      release.set_request_id(reserve.request_id());
      release.set_reason("test");
      EXPECT_TRUE(decode_stub_->Release(&context, release, &response).ok());
    }
    outcome.ids.push_back(static_cast<std::int32_t>(outcome.first.id()));
    outcome.ids.insert(outcome.ids.end(), later.begin(), later.end());
    return outcome;
  }

  // All blocks of both workers are free and nothing is in flight.
  ::testing::AssertionResult Settles() {
    const auto until = std::chrono::steady_clock::now() + seconds(kSettleS);
    while (decode().usage().n_blocks_used + prefill().usage().n_blocks_used + decode().in_flight() +
               prefill().in_flight() >
           0) {
      if (std::chrono::steady_clock::now() > until) {
        return ::testing::AssertionFailure()
               << "decode holds " << decode().usage().n_blocks_used << " blocks of " << decode().in_flight()
               << " requests, prefill " << prefill().usage().n_blocks_used << " of " << prefill().in_flight();
      }
      std::this_thread::sleep_for(milliseconds(10));
    }
    return ::testing::AssertionSuccess();
  }

 private:
  TransportFactory Factory(const std::string& name) {
    return [this, name](TransportListener& listener) -> Result<std::unique_ptr<Transport>> {
      if (wire_ == Wire::kUcxTcp) {
        UcxTransportOptions options;
        options.name = name;
        options.tls = "tcp";
        options.net_devices = "lo";
        return CreateUcxTransport(options, listener);
      }
      TransportOptions options;
      options.name = name;
      options.piece_bytes = 64 << 10;
      const Delivery delivery = wire_ == Wire::kLoopbackPut ? Delivery::kPut : Delivery::kActiveMessage;
      auto transport = LoopbackTransport::Create(options, listener, hub_, delivery);
      if (!transport.ok()) return transport.status();
      return std::unique_ptr<Transport>(std::move(*transport));
    };
  }

  const Wire wire_;
  std::shared_ptr<LoopbackHub> hub_ = std::make_shared<LoopbackHub>();
  Metrics decode_metrics_{"test"};
  Metrics prefill_metrics_{"test"};
  std::unique_ptr<WorkerService> decode_service_, prefill_service_;
  DecodeCore* decode_core_ = nullptr;
  PrefillCore* prefill_core_ = nullptr;
  std::unique_ptr<GrpcServer> decode_server_, prefill_server_;
  std::unique_ptr<v1::Decode::Stub> decode_stub_;
  std::unique_ptr<v1::Prefill::Stub> prefill_stub_;
  int n_requests_ = 0;
};

std::vector<std::int32_t> Prompt(int n_tokens) {
  std::mt19937 rng(static_cast<unsigned>(n_tokens));
  std::vector<std::int32_t> ids;
  const auto vocab = static_cast<std::uint32_t>(TheModels().alone->config().vocab_size);
  for (int i = 0; i < n_tokens; ++i) ids.push_back(static_cast<std::int32_t>(rng() % vocab));
  return ids;
}

v1::SamplingParams Sampling(int max_tokens, float temperature = 0) {
  v1::SamplingParams sampling;
  sampling.set_max_tokens(static_cast<std::uint32_t>(max_tokens));
  sampling.set_temperature(temperature);
  sampling.set_seed(20260131);
  sampling.set_ignore_eos(true);
  return sampling;
}

class WorkerPairTest : public ::testing::TestWithParam<Wire> {};

TEST_P(WorkerPairTest, GivesTheTokensOfASingleProcess) {
  Cluster cluster(GetParam());
  constexpr int kMaxTokens = 12;
  for (const auto& [profile, format] : TheModels().alone->formats()) {
    if (profile != "bf16" && profile != "q4") continue;
    for (const int n : {1, 63, 64, 65, 300, 700}) {
      SCOPED_TRACE(profile + " " + std::to_string(n));
      const std::vector<std::int32_t> prompt = Prompt(n);
      SamplingParams sampling;
      sampling.max_tokens = kMaxTokens;
      sampling.temperature = n == 300 ? 0.8f : 0;  // random numbers travel by position
      sampling.seed = 20260131;
      sampling.ignore_eos = true;
      const Completion alone =
          Must(GenerateLocally(TheModels().alone->model(), format, prompt, sampling, nullptr, 128));
      const v1::ReserveRequest reserve = cluster.ReserveFor(n, kMaxTokens, profile);
      v1::Lease lease;
      ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
      const Outcome outcome = cluster.Run(reserve, lease, prompt, Sampling(kMaxTokens, sampling.temperature));
      ASSERT_TRUE(outcome.prefill.ok()) << outcome.prefill.error_message();
      ASSERT_TRUE(outcome.decode.ok()) << outcome.decode.error_message();
      EXPECT_EQ(outcome.ids, alone.ids);
      EXPECT_EQ(outcome.n_dones, 1);
      EXPECT_EQ(outcome.n_admitted, 1);
      EXPECT_EQ(outcome.n_finals, 1);
      EXPECT_EQ(outcome.final.finish_reason(), v1::FINISH_REASON_LENGTH);
      // The bytes on the wire are the bytes resident at decode; decode has verified every block's checksum.
      EXPECT_EQ(outcome.done.kv_bytes().wire(), outcome.admitted.kv_bytes().packed());
      EXPECT_EQ(outcome.done.kv_bytes().packed(), outcome.admitted.kv_bytes().packed());
      EXPECT_EQ(outcome.done.kv_bytes().raw(), outcome.admitted.kv_bytes().raw());
      if (GetParam() != Wire::kLoopbackPut) {
        EXPECT_EQ(outcome.admitted.kv_bytes().wire(), outcome.done.kv_bytes().wire());
      }
      EXPECT_GT(outcome.done.wire_seconds(), 0);
      EXPECT_LE(outcome.done.wire_hidden_seconds(), outcome.done.wire_seconds());
      EXPECT_GT(outcome.done.prefill_seconds(), 0);
      EXPECT_FALSE(outcome.done.transport().empty());
      EXPECT_TRUE(cluster.Settles());
    }
  }
}

TEST_P(WorkerPairTest, AFirstTokenThatEndsTheRequestNeedsNoDecode) {
  Cluster cluster(GetParam());
  const v1::ReserveRequest reserve = cluster.ReserveFor(300, 1, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const Outcome outcome = cluster.Run(reserve, lease, Prompt(300), Sampling(1));
  EXPECT_TRUE(outcome.prefill.ok()) << outcome.prefill.error_message();
  EXPECT_EQ(outcome.first.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(outcome.n_dones, 1);
  EXPECT_EQ(outcome.n_finals, 0);
  EXPECT_TRUE(cluster.Settles());
}

TEST_P(WorkerPairTest, ACancelAtAnyStageReturnsAllBlocks) {
  Cluster cluster(GetParam());
  for (const std::string stage : {"started", "first_token", "admitted", "token", "done"}) {
    for (const bool both : {true, false}) {
      SCOPED_TRACE(stage + (both ? " both" : " one"));
      const v1::ReserveRequest reserve = cluster.ReserveFor(700, 400, "bf16");
      v1::Lease lease;
      ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
      EXPECT_GT(cluster.decode().usage().n_blocks_used, 0u);
      const Outcome outcome =
          cluster.Run(reserve, lease, Prompt(700), Sampling(400),
                      [&](const std::string& event, grpc::ClientContext& prefill, grpc::ClientContext& decode) {
                        if (event != stage) return;
                        if (both || stage == "started" || stage == "first_token") prefill.TryCancel();
                        if (both || stage == "admitted" || stage == "token" || stage == "done") decode.TryCancel();
                      });
      EXPECT_FALSE(outcome.decode.ok() && outcome.prefill.ok());
      EXPECT_EQ(outcome.n_finals, 0);
      EXPECT_TRUE(cluster.Settles());
    }
  }
}

TEST_P(WorkerPairTest, ALostPeerEndsBothSidesAndTheNextRequestConnectsAnew) {
  Cluster cluster(GetParam());
  const v1::ReserveRequest reserve = cluster.ReserveFor(2000, 8, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  const Outcome outcome = cluster.Run(reserve, lease, Prompt(2000), Sampling(8),
                                      [&](const std::string& event, grpc::ClientContext&, grpc::ClientContext&) {
                                        if (event != "started") return;
                                        std::this_thread::sleep_for(milliseconds(30));
                                        cluster.prefill().ClosePeers();
                                      });
  EXPECT_EQ(outcome.prefill.error_code(), grpc::StatusCode::UNAVAILABLE) << outcome.prefill.error_message();
  EXPECT_NE(outcome.prefill.error_message().find(kDecodeName), std::string::npos) << outcome.prefill.error_message();
  EXPECT_FALSE(outcome.decode.ok());
  EXPECT_EQ(outcome.n_admitted, 0);
  EXPECT_TRUE(cluster.Settles());

  const v1::ReserveRequest again = cluster.ReserveFor(100, 4, "bf16");
  ASSERT_TRUE(cluster.Reserve(again, &lease).ok());
  const Outcome second = cluster.Run(again, lease, Prompt(100), Sampling(4));
  EXPECT_TRUE(second.prefill.ok()) << second.prefill.error_message();
  EXPECT_TRUE(second.decode.ok()) << second.decode.error_message();
  EXPECT_TRUE(cluster.Settles());
}

INSTANTIATE_TEST_SUITE_P(Wires, WorkerPairTest, ::testing::Values(Wire::kLoopbackAm, Wire::kLoopbackPut, Wire::kUcxTcp),
                         [](const ::testing::TestParamInfo<Wire>& test) { return WireName(test.param); });

TEST(WorkerPairLimitsTest, ReserveRefusesWhatItCannotServe) {
  Cluster cluster(Wire::kLoopbackAm, 30'000, 8 << 20);
  v1::Lease lease;
  const auto code = [&](const std::function<void(v1::ReserveRequest&)>& change) {
    v1::ReserveRequest request = cluster.ReserveFor(64, 8, "bf16");
    change(request);
    return cluster.Reserve(request, &lease).error_code();
  };
  EXPECT_EQ(code([](auto& r) { r.set_model_fingerprint("other"); }), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_plan_id("other"); }), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_layout_hash(1); }), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(code([](auto& r) { r.set_profile("no-such"); }), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(code([](auto& r) { r.set_n_prompt_tokens(0); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) { r.set_n_prompt_tokens(4'000'000'000u); }), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code([](auto& r) { r.set_n_prompt_tokens(8000); }), grpc::StatusCode::RESOURCE_EXHAUSTED);
  const v1::ReserveRequest twice = cluster.ReserveFor(64, 8, "bf16");
  ASSERT_TRUE(cluster.Reserve(twice, &lease).ok());
  v1::Lease second;
  EXPECT_EQ(cluster.Reserve(twice, &second).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  cluster.decode().Release({lease.lease_id(), lease.generation() + 1}, "stale");
  EXPECT_EQ(cluster.decode().in_flight(), 1u);
  cluster.decode().Release({lease.lease_id(), lease.generation()}, "test");
  EXPECT_TRUE(cluster.Settles());
}

TEST(WorkerPairLimitsTest, ALeaseThatNobodyFillsExpires) {
  Cluster cluster(Wire::kLoopbackAm, 300);
  const v1::ReserveRequest reserve = cluster.ReserveFor(100, 8, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + seconds(kSettleS));
  v1::DecodeRequest request;
  request.set_lease_id(lease.lease_id());
  request.set_generation(lease.generation());
  request.set_request_id(reserve.request_id());
  request.set_n_prompt_tokens(100);
  *request.mutable_sampling() = Sampling(8);
  const auto stream = cluster.decode_stub().Generate(&context, request);
  v1::DecodeEvent event;
  EXPECT_FALSE(stream->Read(&event));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_NE(status.error_message().find("expired"), std::string::npos) << status.error_message();
  EXPECT_NE(cluster.decode_metrics().Render().find("zeroc_kv_leases_expired_total"), std::string::npos);
  EXPECT_TRUE(cluster.Settles());
  // Prefill comes too late: it is refused, and its own blocks come back.
  const Outcome late = cluster.Run(reserve, lease, Prompt(100), Sampling(8));
  EXPECT_FALSE(late.prefill.ok());
  EXPECT_EQ(late.decode.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << "the reason is kept for a late caller";
  EXPECT_TRUE(cluster.Settles());
}

TEST(WorkerPairLimitsTest, PrefillRefusesWhatDoesNotFitTheLease) {
  Cluster cluster(Wire::kLoopbackAm);
  const v1::ReserveRequest reserve = cluster.ReserveFor(100, 8, "bf16");
  v1::Lease lease;
  ASSERT_TRUE(cluster.Reserve(reserve, &lease).ok());
  EXPECT_EQ(cluster.Run(reserve, lease, Prompt(99), Sampling(8)).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  ASSERT_TRUE(cluster.Settles());
  const v1::ReserveRequest bad_ids = cluster.ReserveFor(3, 8, "bf16");
  ASSERT_TRUE(cluster.Reserve(bad_ids, &lease).ok());
  EXPECT_EQ(cluster.Run(bad_ids, lease, {1, -1, 2}, Sampling(8)).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_TRUE(cluster.Settles());
  v1::Lease truncated = lease;
  truncated.mutable_kv_layout()->resize(20);
  EXPECT_EQ(cluster.Run(bad_ids, truncated, {1, 2, 3}, Sampling(8)).prefill.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  v1::Lease small_arena = lease;
  small_arena.set_arena_bytes(64);
  EXPECT_EQ(cluster.Run(bad_ids, small_arena, {1, 2, 3}, Sampling(8)).prefill.error_code(),
            grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_TRUE(cluster.Settles());
}

}  // namespace
}  // namespace zeroc
