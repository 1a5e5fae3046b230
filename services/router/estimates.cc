#include "services/router/estimates.h"

#include <algorithm>
#include <cmath>

namespace zeroc {
namespace {

constexpr std::size_t kEntriesMax = 1024;
// What a transfer of less says about bandwidth is mostly latency and clock.
constexpr std::uint64_t kWireBytesMin = 64 << 10;

// x that spread less than this share of their mean are nearly the same.
constexpr double kSpreadMin = 0.05;

}  // namespace

void LineEstimate::Add(double x, double y) {
  if (!std::isfinite(x) || !std::isfinite(y) || x < 0 || y < 0) return;
  ++n_;
  w_ = w_ * kKeep + 1;
  x_ = x_ * kKeep + x;
  y_ = y_ * kKeep + y;
  xx_ = xx_ * kKeep + x * x;
  xy_ = xy_ * kKeep + x * y;
}

Line LineEstimate::Fit() const {
  if (n_ == 0) return {};
  const double x = x_ / w_, y = y_ / w_;
  const Line proportional = x > 0 ? Line{0, y / x} : Line{y, 0};
  const double spread = xx_ / w_ - x * x;
  if (spread <= kSpreadMin * x * kSpreadMin * x) return flat_ == Flat::kConstant ? Line{y, 0} : proportional;
  const double slope = (xy_ / w_ - x * y) / spread;
  if (slope <= 0) return {y, 0};
  const double base = y - slope * x;
  return base < 0 ? proportional : Line{base, slope};
}

template <typename Map>
typename Map::mapped_type& Estimates::Touch(Map& map, const typename Map::key_type& key) {
  if (map.size() >= kEntriesMax && !map.contains(key)) {
    map.erase(std::min_element(map.begin(), map.end(),
                               [](const auto& x, const auto& y) { return x.second.touched < y.second.touched; }));
  }
  auto& entry = map[key];
  entry.touched = ++clock_;
  return entry;
}

void Estimates::AddTransfer(const Transfer& t) {
  MutexLock lock(mu_);
  const std::uint32_t n_ranks = std::max<std::uint32_t>(1, t.n_ranks);
  if (t.n_tokens > 0) {
    for (Prefill* prefill :
         {&Touch(prefills_, {t.prefill, n_ranks}), &Touch(prefills_, {t.prefill, kAnyRanks}), &any_prefill_}) {
      prefill->seconds.Add(static_cast<double>(t.n_tokens) / n_ranks, t.prefill_seconds);
    }
  }
  if (t.wire_bytes < kWireBytesMin || !(t.wire_seconds > 0)) return;
  const double could_hide = std::min(t.wire_seconds, t.prefill_seconds);
  for (Pair* pair : {&Touch(pairs_, {t.prefill, n_ranks, t.decode}), &any_pair_}) {
    pair->seconds.Add(static_cast<double>(t.wire_bytes), t.wire_seconds);
    if (could_hide > 0) pair->hidden.Add(could_hide, std::clamp(t.hidden_seconds, 0.0, could_hide));
  }
}

void Estimates::AddDecode(const std::string& decode, std::uint64_t n_tokens, double decode_seconds,
                          std::uint64_t kv_bytes) {
  if (n_tokens == 0) return;
  MutexLock lock(mu_);
  for (Decode* entry : {&Touch(decodes_, decode), &any_decode_}) {
    entry->token_seconds.Add(static_cast<double>(kv_bytes), decode_seconds / static_cast<double>(n_tokens));
    entry->request_seconds.Add(1, decode_seconds);
  }
}

void Estimates::AddOutputLength(std::uint64_t n_tokens) {
  MutexLock lock(mu_);
  output_.Add(1, static_cast<double>(n_tokens));
}

std::optional<LinkView> Estimates::Link(const std::string& prefill, const std::string& decode,
                                        std::uint32_t n_ranks) const {
  MutexLock lock(mu_);
  const auto found = pairs_.find({prefill, n_ranks, decode});
  const Pair& pair = found != pairs_.end() && found->second.seconds.n() >= kPointsMin ? found->second : any_pair_;
  if (pair.seconds.n() < kPointsMin) return std::nullopt;
  return LinkView{pair.seconds.Fit(), std::clamp(pair.hidden.Ratio(), 0.0, 1.0)};
}

std::optional<Line> Estimates::PrefillSeconds(const std::string& prefill, std::uint32_t n_ranks) const {
  MutexLock lock(mu_);
  const Prefill* entry = &any_prefill_;
  for (const std::uint32_t measured_with : {n_ranks, kAnyRanks}) {
    const auto found = prefills_.find({prefill, measured_with});
    if (found == prefills_.end() || found->second.seconds.n() < kPointsMin) continue;
    entry = &found->second;
    break;
  }
  if (entry->seconds.n() < kPointsMin) return std::nullopt;
  const Line of_a_rank = entry->seconds.Fit();
  return Line{of_a_rank.base, of_a_rank.slope / n_ranks};
}

std::optional<Line> Estimates::TokenSeconds(const std::string& decode) const {
  MutexLock lock(mu_);
  const auto found = decodes_.find(decode);
  const Decode& entry =
      found != decodes_.end() && found->second.token_seconds.n() >= kPointsMin ? found->second : any_decode_;
  if (entry.token_seconds.n() < kPointsMin) return std::nullopt;
  return entry.token_seconds.Fit();
}

std::optional<double> Estimates::RequestDecodeSeconds(const std::string& decode) const {
  MutexLock lock(mu_);
  const auto found = decodes_.find(decode);
  const Decode& entry = found != decodes_.end() ? found->second : any_decode_;
  if (entry.request_seconds.n() == 0) return std::nullopt;
  return entry.request_seconds.Fit().base;
}

double Estimates::ExpectedOutput(std::uint32_t max_tokens) const {
  MutexLock lock(mu_);
  if (output_.n() == 0) return max_tokens;
  return std::min<double>(max_tokens, std::max(1.0, output_.Fit().base));
}

}  // namespace zeroc
