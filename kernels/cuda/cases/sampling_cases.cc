// Drawing against a plain sort in double.
#include <algorithm>

#include "kernels/cuda/cases/cases.h"
#include "kernels/cuda/sampling.h"

namespace zeroc::kernels::cuda {
namespace {

struct Candidate {
  int id;
  float logit;
};

// The sampler's candidates, in its order.
std::vector<Candidate> Order(const float* logits, int vocab, const SampleRow& row) {
  std::vector<Candidate> all;
  all.reserve(static_cast<std::size_t>(vocab));
  for (int i = 0; i < vocab; ++i) all.push_back({i, logits[i] / row.temperature});
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const bool cuts = row.top_k > 0 && row.top_k < vocab;
  if (!cuts && row.min_p == 0 && row.top_p == 1) {
    std::iter_swap(all.begin(), std::min_element(all.begin(), all.end(), better));
    return all;
  }
  std::sort(all.begin(), all.end(), better);
  if (cuts) all.resize(static_cast<std::size_t>(row.top_k));
  const float floor = all[0].logit + std::log(row.min_p);
  while (row.min_p > 0 && all.size() > 1 && all.back().logit < floor) all.pop_back();
  double total = 0, sum = 0;
  for (const Candidate& c : all) total += std::exp(double{c.logit} - all[0].logit);
  for (std::size_t i = 0; i < all.size() && row.top_p < 1; ++i) {
    sum += std::exp(double{all[i].logit} - all[0].logit);
    if (sum >= double{row.top_p} * total) all.resize(i + 1);
  }
  return all;
}

// The id drawn must be the one into whose share of [0, 1) the random number falls, give or take the weights' rounding.
void CheckDraw(const float* logits, int vocab, const SampleRow& row, int id, Outcome& outcome) {
  if (row.temperature == 0) {
    outcome.Expect(id == std::max_element(logits, logits + vocab) - logits, "greedy");
    return;
  }
  const auto candidates = Order(logits, vocab, row);
  const double best =
      std::max_element(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
        return a.logit < b.logit;
      })->logit;
  double total = 0, before = 0, own = -1;
  for (const Candidate& c : candidates) total += std::exp(c.logit - best);
  for (const Candidate& c : candidates) {
    own = std::exp(c.logit - best) / total;
    if (c.id == id) break;
    before += own;
    own = -1;
  }
  outcome.Expect(own >= 0, "a token that the filters exclude");
  outcome.Check(row.uniform, before + own / 2, own / 2 + 2e-6);
}

void SampleCase(Outcome& outcome) {
  for (const int vocab : {1, 7, 300, 1031}) {
    Random random(static_cast<unsigned>(vocab));
    std::vector<SampleRow> rows;
    for (const float temperature : {0.0f, 1.0f, 0.7f}) {
      for (const int top_k : {0, 1, 5, 40}) {
        for (const float top_p : {1.0f, 0.9f, 0.3f}) {
          for (const float min_p : {0.0f, 0.05f}) {
            for (const double uniform : {0.0, 0.37, 0.999999}) {
              const int n = top_k + static_cast<int>(100 * uniform) + static_cast<int>(10 * top_p);
              if ((temperature != 1.0f || vocab > 100) && n % 3 != 0) continue;  // a third will do
              rows.push_back({uniform, temperature, top_p, min_p, top_k});
            }
          }
        }
      }
    }
    const std::int64_t stride = vocab + 3;
    auto logits = random.Normals(static_cast<std::int64_t>(rows.size()) * stride, 3.0f);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (i % 4 == 0) logits[i] = std::round(logits[i]);  // many equals
      if (i % 97 == 3) logits[i] = -kInf;
      if (i % 89 == 3) logits[i] = -0.0f;
    }
    for (std::size_t r = 0; r < rows.size(); ++r) logits[r * static_cast<std::size_t>(stride)] = 0.0f;
    const Buffer<float> device(logits);
    const Buffer<SampleRow> device_rows(rows);
    const Buffer<std::int32_t> ids(rows.size());
    outcome.Done(
        Sample({device.data(), stride, static_cast<std::int32_t>(rows.size()), vocab, device_rows.data(), ids.data()},
               nullptr));
    const auto got = ids.ToHost();
    for (std::size_t r = 0; r < rows.size(); ++r) {
      CheckDraw(logits.data() + static_cast<std::int64_t>(r) * stride, vocab, rows[r], got[r], outcome);
    }
  }
  outcome.Expect(Sample({nullptr, 4, 1, 5, nullptr, nullptr}, nullptr) == KernelStatus::kBadShape, "bad shape taken");
}

constexpr Case kCases[] = {{"sampling", "sample", SampleCase}};

}  // namespace

std::span<const Case> SamplingCases() { return kCases; }

}  // namespace zeroc::kernels::cuda
