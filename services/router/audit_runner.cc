#include "services/router/audit_runner.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <utility>

#include "services/common/logging.h"

namespace zeroc {
namespace {

constexpr std::uint32_t kTopLogprobs = 20;

v1::GenerateRequest ScoreRequestFor(const Audit::Sample& sample, const std::string& profile) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(sample.prompt_ids.begin(), sample.prompt_ids.end());
  v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->mutable_forced_ids()->Assign(sample.output_ids.begin(), sample.output_ids.end());
  sampling->set_max_tokens(static_cast<std::uint32_t>(sample.output_ids.size()));
  sampling->set_temperature(0);
  sampling->set_logprobs(kTopLogprobs);
  request.mutable_kv()->set_profile(profile);
  request.set_priority(std::numeric_limits<std::int32_t>::min());
  return request;
}

}  // namespace

class AuditRunner::Sink : public ResponseSink {
 public:
  Sink(std::shared_ptr<AuditRunner> runner, Timers& timers) : runner_(std::move(runner)), timers_(timers) {}
  void OnStarted(const v1::Started&) override {}
  void OnDelta(const v1::Delta& delta) override {
    logprobs_.insert(logprobs_.end(), delta.logprobs().begin(), delta.logprobs().end());
  }
  void OnFinal(const v1::Final&) override { Hand(OkStatus()); }
  void OnError(const Status& status, ErrorOrigin) override { Hand(status); }

 private:
  // From another thread: the next score is another flow, and must not start inside this one.
  void Hand(const Status& status) {
    timers_.Schedule(timers_.Now(), [runner = std::move(runner_), status, logprobs = std::move(logprobs_)]() mutable {
      runner->OnScored(status, std::move(logprobs));
    });
  }
  std::shared_ptr<AuditRunner> runner_;
  Timers& timers_;
  std::vector<v1::TokenLogprobs> logprobs_;
};

AuditRunner::AuditRunner(const Config& config, Router& router, Audit& audit, Timers& timers, Metrics& metrics)
    : config_(config), router_(router), audit_(audit), timers_(timers), metrics_(metrics) {}

void AuditRunner::Start() {
  timers_.Schedule(timers_.Now() + config_.poll, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Poll();
  });
}

void AuditRunner::Stop() {
  std::shared_ptr<RequestFlow> flow;
  {
    MutexLock lock(mu_);
    stopped_ = true;
    flow = flow_.lock();
  }
  if (flow != nullptr) flow->Cancel(Cancelled("the router is stopping"));
}

void AuditRunner::Poll() {
  bool begin = false;
  {
    MutexLock lock(mu_);
    if (stopped_) return;
    if (!running_ && router_.IsIdle(config_.others_max)) {
      if (std::optional<Audit::Sample> sample = audit_.Take(); sample.has_value()) {
        sample_ = std::move(*sample);
        exact_.clear();
        running_ = begin = true;
      }
    }
  }
  if (begin) Score(std::string(kUncompressedProfile));
  Start();
}

void AuditRunner::Score(const std::string& profile) {
  v1::GenerateRequest request;
  {
    MutexLock lock(mu_);
    request = ScoreRequestFor(sample_, profile);
  }
  const auto flow = router_.Generate(std::move(request), std::nullopt,
                                     std::make_shared<Sink>(shared_from_this(), timers_), RequestKind::kAudit);
  bool stopped = false;
  {
    MutexLock lock(mu_);
    flow_ = flow;
    stopped = stopped_;
  }
  if (stopped) flow->Cancel(Cancelled("the router is stopping"));
}

void AuditRunner::OnScored(const Status& status, std::vector<v1::TokenLogprobs> logprobs) {
  std::string next;
  {
    MutexLock lock(mu_);
    if (!status.ok() || logprobs.size() != sample_.output_ids.size() || stopped_) {
      LogWarning("audit profile=" + sample_.profile + " dropped because=\"" +
                 (status.ok() ? "it was not scored in full" : status.ToString()) + "\"");
      running_ = false;
      return;
    }
    if (exact_.empty()) {
      exact_ = std::move(logprobs);
      next = sample_.profile;
    } else {
      Compare(logprobs);
      running_ = false;
    }
  }
  if (!next.empty()) Score(next);
}

// The first position is prefill's: it attends to exact keys and values more than the others do, and counts like them.
void AuditRunner::Compare(const std::vector<v1::TokenLogprobs>& packed) {
  std::vector<double> kl;
  double logprob_difference = 0;
  for (std::size_t i = 0; i < packed.size(); ++i) {
    kl.push_back(GroupedKl(exact_[i], packed[i]));
    logprob_difference += exact_[i].logprob() - packed[i].logprob();
  }
  audit_.Add(sample_.profile, kl);
  const Audit::Measured measured = audit_.Of(sample_.profile).value_or(Audit::Measured());
  metrics_.SetPplIncrease("audited", measured.increase);
  double sum = 0;
  for (const double x : kl) sum += x;
  const auto n = static_cast<double>(kl.size());
  char text[256];
  std::snprintf(text, sizeof text,
                " n_tokens=%zu kl=%.6g logprob_difference=%.6g ppl_increase=%.6g low=%.6g high=%.6g window_tokens=%llu",
                kl.size(), sum / n, logprob_difference / n, measured.increase, measured.low, measured.high,
                static_cast<unsigned long long>(measured.n_tokens));
  LogInfo("audit profile=" + sample_.profile + text);
}

}  // namespace zeroc
