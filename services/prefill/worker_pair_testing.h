// Shared by the tests of both workers: a prefill and a decode worker in one process, over gRPC on loopback and the KV
// transport, with the demo model, and requests as the router makes them.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/loopback_transport.h"
#include "libzeroc/comm/ucx/ucx_transport.h"
#include "services/common/grpc_server.h"
#include "services/decode/decode_rpc.h"
#include "services/prefill/prefill_rpc.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc::testing {

using std::chrono::milliseconds;
using std::chrono::seconds;

inline constexpr char kModelDir[] = "models/zeroc-demo";
inline constexpr char kDecodeName[] = "decode-under-test";
inline constexpr int kSettleS = 15;

enum class WireKind { kLoopbackAm, kLoopbackPut, kUcxTcp };

inline std::string WireName(WireKind wire) {
  return wire == WireKind::kLoopbackAm ? "LoopbackAm" : wire == WireKind::kLoopbackPut ? "LoopbackPut" : "UcxTcp";
}

template <typename T>
T Must(Result<T> result) {
  ZEROC_CHECK(result.ok(), result.status().ToString());
  return std::move(*result);
}

// Opened once: the two workers of every test, and the single process that they are held against.
struct Models {
  explicit Models(const OpenDevice& prefill_device = nullptr, const OpenDevice& decode_device = nullptr)
      : decode(Must(WorkerModel::Open(kModelDir, "", 1, decode_device))),
        prefill(Must(WorkerModel::Open(kModelDir, "", 1, prefill_device))) {}
  std::unique_ptr<WorkerModel> decode, prefill;
  std::unique_ptr<WorkerModel> alone = Must(WorkerModel::Open(kModelDir, "", 1));
};
inline Models& TheModels() {
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
  explicit Cluster(WireKind wire, std::int64_t lease_expiry_ms = 30'000, std::uint64_t decode_kv_bytes = 96 << 20)
      : Cluster(wire, DecodeOptions(lease_expiry_ms, decode_kv_bytes)) {}
  static DecodeCore::Options DecodeOptions(std::int64_t lease_expiry_ms, std::uint64_t kv_bytes) {
    DecodeCore::Options decode;
    decode.kv_bytes = kv_bytes;
    decode.lease_expiry_ms = lease_expiry_ms;
    return decode;
  }
  Cluster(WireKind wire, const DecodeCore::Options& decode, Models& models = TheModels())
      : wire_(wire), models_(models) {
    auto decode_core = Must(DecodeCore::Create(decode, *models_.decode, decode_metrics_, Factory(kDecodeName)));
    decode_core_ = decode_core.get();
    decode_service_ = MakeDecodeService(std::move(decode_core));
    PrefillCore::Options prefill;
    prefill.kv_bytes = 96 << 20;
    prefill.chunk_tokens = 128;
    auto prefill_core =
        Must(PrefillCore::Create(prefill, *models_.prefill, prefill_metrics_, Factory("prefill-under-test")));
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
  Metrics& prefill_metrics() { return prefill_metrics_; }

  v1::ReserveRequest ReserveFor(int n_tokens, int max_tokens, const std::string& profile) {
    v1::ReserveRequest request;
    request.set_request_id("request-" + std::to_string(++n_requests_));
    request.set_attempt(1);
    request.set_n_prompt_tokens(static_cast<std::uint32_t>(n_tokens));
    request.set_max_tokens(static_cast<std::uint32_t>(max_tokens));
    request.set_profile(profile);
    request.set_plan_id(models_.decode->plan_id());
    request.set_model_fingerprint(models_.decode->fingerprint());
    return request;
  }
  grpc::Status Reserve(const v1::ReserveRequest& request, v1::ReserveResponse* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(kSettleS));
    return decode_stub_->Reserve(&context, request, response);
  }
  grpc::Status Reserve(const v1::ReserveRequest& request, v1::Lease* lease) {
    v1::ReserveResponse response;
    const grpc::Status status = Reserve(request, &response);
    *lease = response.lease();
    return status;
  }

  static v1::PrefillRequest PrefillFor(const v1::ReserveRequest& reserve, const v1::Lease& lease,
                                       const std::vector<std::int32_t>& prompt, const v1::SamplingParams& sampling) {
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
    return prefill;
  }
  // Prefill's call alone, to its end.
  grpc::Status RunPrefill(grpc::ClientContext& context, const v1::PrefillRequest& request) {
    const auto stream = prefill_stub_->Run(&context, request);
    v1::PrefillEvent event;
    while (stream->Read(&event)) {
    }
    return stream->Finish();
  }

  // Both calls of one request; `on_event` sees each event's name as it comes and may act on the contexts. The last
  // n_streamed tokens of the prompt are an earlier attempt's.
  using OnEvent =
      std::function<void(const std::string& event, grpc::ClientContext& prefill, grpc::ClientContext& decode)>;
  Outcome Run(const v1::ReserveRequest& reserve, const v1::Lease& lease, const std::vector<std::int32_t>& prompt,
              const v1::SamplingParams& sampling, const OnEvent& on_event = nullptr, int n_streamed = 0) {
    Outcome outcome;
    v1::DecodeRequest decode;
    decode.set_lease_id(lease.lease_id());
    decode.set_generation(lease.generation());
    decode.set_request_id(reserve.request_id());
    *decode.mutable_sampling() = sampling;
    decode.set_n_prompt_tokens(static_cast<std::uint32_t>(prompt.size()));
    if (n_streamed > 0) decode.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end());
    decode.set_n_streamed(static_cast<std::uint32_t>(n_streamed));
    v1::PrefillRequest prefill = PrefillFor(reserve, lease, prompt, sampling);
    prefill.set_n_streamed(static_cast<std::uint32_t>(n_streamed));

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
      if (wire_ == WireKind::kUcxTcp) {
        UcxTransportOptions options;
        options.name = name;
        options.tls = "tcp";
        options.net_devices = "lo";
        return CreateUcxTransport(options, listener);
      }
      TransportOptions options;
      options.name = name;
      options.piece_bytes = 64 << 10;
      const Delivery delivery = wire_ == WireKind::kLoopbackPut ? Delivery::kPut : Delivery::kActiveMessage;
      auto transport = LoopbackTransport::Create(options, listener, hub_, delivery);
      if (!transport.ok()) return transport.status();
      return std::unique_ptr<Transport>(std::move(*transport));
    };
  }

  const WireKind wire_;
  Models& models_;
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

// Says the same again and again, which the model goes on with: no near ties, whatever instruction set, chunks or ranks
// the prompt is computed with.
inline std::vector<std::int32_t> Prompt(int n_tokens) {
  constexpr int kPeriod = 40;
  std::mt19937 rng(static_cast<unsigned>(n_tokens));
  std::vector<std::int32_t> ids;
  const auto vocab = static_cast<std::uint32_t>(TheModels().alone->config().vocab_size);
  for (int i = 0; i < std::min(n_tokens, kPeriod); ++i) ids.push_back(static_cast<std::int32_t>(rng() % vocab));
  for (int i = kPeriod; i < n_tokens; ++i) ids.push_back(ids[static_cast<std::size_t>(i - kPeriod)]);
  return ids;
}

inline v1::SamplingParams Sampling(int max_tokens, float temperature = 0) {
  v1::SamplingParams sampling;
  sampling.set_max_tokens(static_cast<std::uint32_t>(max_tokens));
  sampling.set_temperature(temperature);
  sampling.set_seed(20260131);
  sampling.set_ignore_eos(true);
  return sampling;
}

}  // namespace zeroc::testing
