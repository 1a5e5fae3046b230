#include "libzeroc/baselines/evicting_caches.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

class H2oCache final : public CacheAttention {
 public:
  H2oCache(const CacheShape& shape, int max_tokens, int budget)
      : CacheAttention(shape, max_tokens), budget_(budget), n_recent_(budget - budget / 2), states_(n_heads_total()) {
    ZEROC_CHECK(budget >= 2, budget);
  }

 protected:
  void OnAppended(Head& head, int first_slot) override {
    State& state = states_[head.idx];
    for (int slot = first_slot; slot < head.store.size(); ++slot) {
      state.mass.push_back(0);
      state.position.push_back(state.next_position++);
    }
  }

  void OnAttended(Head& head, int n_rows, const float* p, std::int64_t stride, int n_slots) override {
    State& state = states_[head.idx];
    for (int r = 0; r < n_rows; ++r) {
      const float* row = p + r * stride;
      for (int t = 0; t < n_slots; ++t) state.mass[static_cast<std::size_t>(t)] += row[t];
    }
    if (in_prompt() || head.store.size() <= budget_) return;
    std::size_t evicted = state.mass.size();
    for (std::size_t t = 0; t < state.mass.size(); ++t) {
      if (state.position[t] >= state.next_position - n_recent_) continue;
      if (evicted == state.mass.size() || state.mass[t] < state.mass[evicted]) evicted = t;
    }
    head.store.ReplaceByLast(static_cast<int>(evicted));
    state.mass[evicted] = state.mass.back();
    state.position[evicted] = state.position.back();
    state.mass.pop_back();
    state.position.pop_back();
  }

  void OnPromptEnd() override {
    for (Head& head : heads()) {
      State& state = states_[head.idx];
      const int n = head.store.size();
      if (n <= budget_) continue;
      std::vector<int> keep =
          LargestIndices({state.mass.data(), static_cast<std::size_t>(n - n_recent_)}, budget_ - n_recent_);
      for (int slot = n - n_recent_; slot < n; ++slot) keep.push_back(slot);
      head.store.Keep(keep);
      for (std::size_t i = 0; i < keep.size(); ++i) {
        state.mass[i] = state.mass[static_cast<std::size_t>(keep[i])];
        state.position[i] = state.position[static_cast<std::size_t>(keep[i])];
      }
      state.mass.resize(keep.size());
      state.position.resize(keep.size());
    }
  }

  std::uint64_t HeadBytes(const Head& head) const override {
    const int row = 2 * shape().head_dim * shape().exact_bytes + static_cast<int>(sizeof(float));
    return static_cast<std::uint64_t>(head.store.size()) * static_cast<std::uint64_t>(row);
  }

 private:
  struct State {
    std::vector<float> mass;  // [slots] attention received
    // [slots]. A cache that keeps its slots in order, as the published one, needs no positions; slots are reused here
    // only to save the copying, so they are not counted as bytes.
    std::vector<int> position;
    int next_position = 0;
  };

  int budget_, n_recent_;
  std::vector<State> states_;  // [heads]
};

class SnapKvCache final : public CacheAttention {
 public:
  SnapKvCache(const CacheShape& shape, int max_tokens, double share)
      : CacheAttention(shape, max_tokens),
        share_(share),
        window_(n_heads_total(), kSnapKvWindow, shape.group(), shape.head_dim) {
    ZEROC_CHECK(share > 0 && share <= 1, share);
  }

 protected:
  void MapQueries(Head& head, int n_tokens, float* q) override {
    if (in_prompt()) window_.Add(head.idx, n_tokens, q);
  }

  void OnPromptEnd() override {
    const int budget = std::max(1, static_cast<int>(std::lround(share_ * n_tokens())));
    const int n_recent = std::min(budget, kSnapKvWindow);
    if (budget >= n_tokens()) return;
    for (Head& head : heads()) {
      std::vector<float> votes = window_.Votes(head.idx, head.store);
      votes.resize(votes.size() - static_cast<std::size_t>(n_recent));
      std::vector<int> keep = LargestIndices(MaxPool(votes, kSnapKvPool), budget - n_recent);
      for (int slot = n_tokens() - n_recent; slot < n_tokens(); ++slot) keep.push_back(slot);
      head.store.Keep(keep);
    }
  }

  std::uint64_t HeadBytes(const Head& head) const override {
    return static_cast<std::uint64_t>(head.store.size()) *
           static_cast<std::uint64_t>(2 * shape().head_dim * shape().exact_bytes);
  }

 private:
  double share_;
  QueryWindow window_;
};

}  // namespace

void QueryWindow::Add(std::size_t head_idx, int n_tokens, const float* q) {
  std::vector<float>& kept = queries_[head_idx];
  kept.insert(kept.end(), q, q + static_cast<std::size_t>(n_tokens) * row_);
  const std::size_t max = static_cast<std::size_t>(window_) * row_;
  if (kept.size() > max) kept.erase(kept.begin(), kept.end() - static_cast<std::ptrdiff_t>(max));
}

std::vector<float> QueryWindow::Votes(std::size_t head_idx, const HeadStore& store) const {
  const std::vector<float>& kept = queries_[head_idx];
  const int n_tokens = static_cast<int>(kept.size() / row_);
  std::vector<int> n_visible;
  for (int t = 0; t < n_tokens; ++t) {
    n_visible.insert(n_visible.end(), static_cast<std::size_t>(group_), store.size() - n_tokens + 1 + t);
  }
  const std::int64_t stride = (store.size() + HeadStore::kBlock - 1) / HeadStore::kBlock * HeadStore::kBlock;
  std::vector<float> p(n_visible.size() * static_cast<std::size_t>(stride));
  store.Probabilities(kept.data(), n_visible, p.data(), stride);
  std::vector<float> votes(static_cast<std::size_t>(store.size()));
  for (std::size_t r = 0; r < n_visible.size(); ++r) {
    const float* row = p.data() + r * static_cast<std::size_t>(stride);
    for (std::size_t t = 0; t < votes.size(); ++t) votes[t] += row[t];
  }
  return votes;
}

std::vector<float> MaxPool(std::span<const float> x, int width) {
  std::vector<float> out(x.size());
  const auto half = static_cast<std::size_t>(width / 2);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t begin = i < half ? 0 : i - half;
    const std::size_t end = std::min(x.size(), i + half + 1);
    out[i] =
        *std::max_element(x.begin() + static_cast<std::ptrdiff_t>(begin), x.begin() + static_cast<std::ptrdiff_t>(end));
  }
  return out;
}

std::vector<int> LargestIndices(std::span<const float> values, int n) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  n = std::min(n, static_cast<int>(order.size()));
  const auto larger = [&](int a, int b) {
    const float x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  };
  std::partial_sort(order.begin(), order.begin() + n, order.end(), larger);
  order.resize(static_cast<std::size_t>(n));
  std::sort(order.begin(), order.end());
  return order;
}

std::unique_ptr<SequenceAttention> NewH2oCache(const CacheShape& shape, int max_tokens, int budget) {
  return std::make_unique<H2oCache>(shape, max_tokens, budget);
}
std::unique_ptr<SequenceAttention> NewSnapKvCache(const CacheShape& shape, int max_tokens, double share) {
  return std::make_unique<SnapKvCache>(shape, max_tokens, share);
}

}  // namespace zeroc
