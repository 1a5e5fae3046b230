#include "services/router/audit.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace zeroc {
namespace {

constexpr double kSigmas95 = 1.96;
// Of what the lists leave out: below it the figures are rounding.
constexpr double kRestMin = 1e-6;

std::map<std::uint32_t, double> ByToken(const v1::TokenLogprobs& logprobs) {
  std::map<std::uint32_t, double> by_token;
  by_token[logprobs.token_id()] = logprobs.logprob();
  for (const v1::TopLogprob& top : logprobs.top()) by_token[top.token_id()] = top.logprob();
  return by_token;
}

}  // namespace

double GroupedKl(const v1::TokenLogprobs& exact, const v1::TokenLogprobs& packed) {
  const std::map<std::uint32_t, double> p = ByToken(exact), q = ByToken(packed);
  double kl = 0, p_rest = 1, q_rest = 1;
  for (const auto& [id, logprob] : p) {
    const auto other = q.find(id);
    if (other == q.end()) continue;
    kl += std::exp(logprob) * (logprob - other->second);
    p_rest -= std::exp(logprob);
    q_rest -= std::exp(other->second);
  }
  p_rest = std::max(p_rest, kRestMin);
  q_rest = std::max(q_rest, kRestMin);
  kl += p_rest * std::log(p_rest / q_rest);
  return std::isfinite(kl) ? std::max(kl, 0.0) : 0.0;
}

Audit::Audit(const Config& config, std::span<const Rung> ladder, double ppl_base, std::uint64_t seed)
    : config_(config), ladder_(ladder), ppl_base_(ppl_base), random_(seed) {}

void Audit::Offer(Sample sample) {
  const std::size_t n_tokens = sample.prompt_ids.size() + sample.output_ids.size();
  if (config_.share <= 0 || sample.output_ids.size() < 2 || n_tokens > config_.tokens_max) return;
  MutexLock lock(mu_);
  if (std::uniform_real_distribution<double>(0, 1)(random_) >= config_.share) return;
  pending_.push_back(std::move(sample));
  if (pending_.size() > config_.pending_max) pending_.pop_front();
}

std::optional<Audit::Sample> Audit::Take() {
  MutexLock lock(mu_);
  while (!pending_.empty()) {
    Sample sample = std::move(pending_.front());
    pending_.pop_front();
    const Record* longest_ago = nullptr;
    const std::string* raised = nullptr;
    for (const auto& [profile, record] : records_) {
      if (!record.raised || (longest_ago != nullptr && record.touched >= longest_ago->touched)) continue;
      longest_ago = &record;
      raised = &profile;
    }
    const bool exact = sample.profile == kUncompressedProfile;
    if (raised != nullptr && (exact || n_taken_ % 2 == 0)) sample.profile = *raised;
    if (exact && raised == nullptr) continue;  // nothing to compare
    ++n_taken_;
    return sample;
  }
  return std::nullopt;
}

void Audit::Add(const std::string& profile, std::span<const double> kl) {
  const auto rung =
      std::find_if(ladder_.begin(), ladder_.end(), [&](const Rung& candidate) { return candidate.name == profile; });
  if (kl.empty() || rung == ladder_.end()) return;
  Batch batch;
  for (const double x : kl) {
    ++batch.n;
    batch.sum += x;
    batch.squares += x * x;
  }
  MutexLock lock(mu_);
  Record& record = records_[profile];
  const auto count = [&](const Batch& one, double sign) {
    record.total.n = sign > 0 ? record.total.n + one.n : record.total.n - one.n;
    record.total.sum += sign * one.sum;
    record.total.squares += sign * one.squares;
  };
  record.batches.push_back(batch);
  count(batch, 1);
  while (record.batches.size() > 1 && record.total.n > config_.window_tokens) {
    count(record.batches.front(), -1);
    record.batches.pop_front();
  }
  record.touched = n_taken_;
  const Measured measured = Judge(record);
  if (measured.n_tokens < config_.tokens_min || !rung->measured) return;
  if (measured.low > rung->ppl_increase) record.raised = true;
  if (measured.increase <= rung->ppl_increase) record.raised = false;
}

Audit::Measured Audit::Judge(const Record& record) const {
  const auto n = static_cast<double>(record.total.n);
  const double mean = record.total.sum / n;
  const double variance = std::max(0.0, record.total.squares / n - mean * mean);
  const double half = kSigmas95 * std::sqrt(variance / n);
  const auto increase = [&](double kl) { return ppl_base_ * std::expm1(std::max(kl, 0.0)); };
  return {increase(mean), increase(mean - half), increase(mean + half), record.total.n};
}

std::vector<std::optional<double>> Audit::Excess() const {
  std::vector<std::optional<double>> excess(ladder_.size());
  MutexLock lock(mu_);
  for (std::size_t i = 0; i < ladder_.size(); ++i) {
    const auto found = records_.find(ladder_[i].name);
    if (found != records_.end() && found->second.raised) excess[i] = Judge(found->second).increase;
  }
  return excess;
}

std::optional<Audit::Measured> Audit::Of(const std::string& profile) const {
  MutexLock lock(mu_);
  const auto found = records_.find(profile);
  if (found == records_.end()) return std::nullopt;
  return Judge(found->second);
}

}  // namespace zeroc
