// What a finished request leaves behind: its statistics, its metrics and its line in the access log.
#include <algorithm>
#include <cstdio>

#include "services/common/logging.h"
#include "services/router/request_flow.h"

namespace zeroc {
namespace {

std::string Seconds(const char* name, double seconds) {
  char text[64];
  std::snprintf(text, sizeof text, " %s_s=%.6f", name, seconds);
  return text;
}

std::string OutcomeName(const Status& status) {
  std::string name(StatusCodeName(status.code()));
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

}  // namespace

v1::RequestStats RequestFlow::Stats() const {
  v1::RequestStats stats;
  *stats.mutable_phases() = PhasesOf(times_);
  stats.set_ttft_seconds(TtftSeconds(times_));
  stats.set_jct_seconds(JctSeconds(times_));
  stats.set_attempts(1 + n_elsewhere_);
  if (attempt_ == nullptr) return stats;
  const v1::PrefillDone& transfer = attempt_->transfer;
  *stats.mutable_kv_bytes() = transfer.kv_bytes();
  if (attempt_->resident.packed() != 0) stats.mutable_kv_bytes()->set_packed(attempt_->resident.packed());
  stats.set_wire_total_seconds(transfer.wire_seconds());
  if (transfer.wire_seconds() > 0) {
    stats.set_wire_hidden_share(std::clamp(transfer.wire_hidden_seconds() / transfer.wire_seconds(), 0.0, 1.0));
  }
  stats.set_transport(transfer.transport());
  stats.set_sp_ranks(attempt_->prefill_worker.n_ranks());
  stats.set_prefill_worker(attempt_->prefill_worker.name());
  stats.set_decode_worker(attempt_->decode_worker.name());
  if (attempt_->plan().local_prefill) {
    stats.mutable_kv_bytes()->set_raw(attempt_->resident.raw());
    stats.set_transport("none: prefilled by decode");
    stats.set_prefill_worker(attempt_->decode_worker.name());
  }
  return stats;
}

// What the next decisions go by.
void RequestFlow::Learn() const {
  const v1::PrefillDone& transfer = attempt_->transfer;
  if (!attempt_->plan().local_prefill && transfer.kv_bytes().wire() > 0) {
    Estimates::Transfer facts;
    facts.prefill = attempt_->prefill_worker.name();
    facts.decode = attempt_->decode_worker.name();
    facts.n_tokens = attempt_->n_prompt_tokens() - attempt_->n_cached_tokens;
    facts.prefill_seconds = transfer.prefill_seconds();
    facts.wire_bytes = transfer.kv_bytes().wire();
    facts.wire_seconds = transfer.wire_seconds();
    facts.hidden_seconds = transfer.wire_hidden_seconds();
    facts.n_ranks = attempt_->prefill_worker.n_ranks();
    context_.estimates.AddTransfer(facts);
  }
  // The first token of an attempt is prefill's.
  const std::size_t n_before = attempt_->plan().n_streamed + 1;
  const std::size_t n_decoded = answer_.ids().size() - std::min(answer_.ids().size(), n_before);
  if (attempt_->decode_finish != v1::FINISH_REASON_UNSPECIFIED) {
    const double growth = 1 + static_cast<double>(n_decoded) / 2 / attempt_->n_prompt_tokens();
    const auto kv_bytes = static_cast<std::uint64_t>(static_cast<double>(attempt_->resident.packed()) * growth);
    context_.estimates.AddDecode(attempt_->decode_worker.name(), n_decoded, attempt_->decode_seconds, kv_bytes);
  }
  if (!sampling_.forced_ids().empty()) return;
  context_.estimates.AddOutputLength(answer_.ids().size());
  context_.audit.Offer({prompt_ids_, answer_.ids(), rung_->name});
}

void RequestFlow::CountMetrics(const std::string& outcome, const v1::RequestStats& stats) {
  const v1::PhaseSeconds& phases = stats.phases();
  Metrics& metrics = context_.metrics;
  // Scored tokens of a prompt: the answer's `usage` counts them as the prompt's, too.
  const std::size_t n_forced = std::min(answer_.ids().size(), static_cast<std::size_t>(sampling_.forced_ids_size()));
  metrics.ObserveJct(rung_ != nullptr ? rung_->name : "none", outcome, stats.jct_seconds());
  if (outcome == "ok") {
    metrics.ObservePhase("queue", phases.queue());
    metrics.ObservePhase("reserve", phases.reserve());
    metrics.ObservePhase("prefill", phases.prefill());
    metrics.ObservePhase("wire", phases.wire());
    metrics.ObservePhase("admit", phases.admit());
    metrics.ObservePhase("decode", phases.decode());
    metrics.ObserveE2eLatency(stats.jct_seconds());
    metrics.ObserveQueueTime(phases.queue());
    metrics.ObservePrefillTime(phases.prefill());
    metrics.ObserveDecodeTime(phases.decode());
    metrics.CountSuccess(answer_.finish_reason() == v1::FINISH_REASON_LENGTH ? "length" : "stop");
    metrics.AddPromptTokens(prompt_ids_.size() + n_forced);
  }
  metrics.AddGenerationTokens(answer_.ids().size() - n_forced);
  if (stats.kv_bytes().wire() > 0) {
    metrics.AddKvBytes("raw", stats.kv_bytes().raw());
    metrics.AddKvBytes("packed", stats.kv_bytes().packed());
    metrics.AddKvBytes("wire", stats.kv_bytes().wire());
    metrics.ObserveKvCompressionRatio(static_cast<double>(stats.kv_bytes().raw()) /
                                      static_cast<double>(stats.kv_bytes().wire()));
    metrics.ObserveKvTransfer(stats.wire_total_seconds());
  }
}

void RequestFlow::Account(const Status& status) {
  const v1::RequestStats stats = Stats();
  const v1::PhaseSeconds& phases = stats.phases();
  const std::string outcome = OutcomeName(status);
  const std::string profile = rung_ != nullptr ? rung_->name : "none";
  if (status.ok()) Learn();
  if (is_client()) CountMetrics(outcome, stats);

  std::string line = "request id=" + id() + " outcome=" + outcome + " profile=" + profile + " reason=" + reason_ +
                     " prompt_tokens=" + std::to_string(prompt_ids_.size()) +
                     " output_tokens=" + std::to_string(answer_.ids().size());
  line += Seconds("jct", stats.jct_seconds()) + Seconds("ttft", stats.ttft_seconds()) +
          Seconds("queue", phases.queue()) + Seconds("reserve", phases.reserve()) +
          Seconds("prefill", phases.prefill()) + Seconds("wire", phases.wire()) + Seconds("admit", phases.admit()) +
          Seconds("decode", phases.decode());
  line += " kv_raw_bytes=" + std::to_string(stats.kv_bytes().raw()) +
          " kv_packed_bytes=" + std::to_string(stats.kv_bytes().packed()) +
          " kv_wire_bytes=" + std::to_string(stats.kv_bytes().wire()) + " prefill_worker=" + stats.prefill_worker() +
          " decode_worker=" + stats.decode_worker() + " attempts=" + std::to_string(stats.attempts());
  if (!status.ok()) line += " error=\"" + std::string(status.message()) + "\"";
  Log(status.ok() ? LogLevel::kInfo : LogLevel::kWarning, line);
}

}  // namespace zeroc
