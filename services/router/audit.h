// Do profiles keep their promise? A sampled share of the served requests is scored again, with exact KV and with a
// profile's; what the two distributions differ by is held against the plan. Free of I/O; audit_runner.h does the work.
//
// Measured is KL(bf16 || profile) of the next token, at the positions of the answers: the mean m over the last tokens
// gives the increase ppl_base * (exp(m) - 1), which is what the plan promises. The answers' own log probabilities would
// not do: they were drawn from the profile's distribution and so favour it.
//
// Once a profile surely costs more than promised (the lower end of a 95 % interval, over enough tokens), the measured
// mean takes the promise's place, until it is back at the promise.
//
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "services/router/policy.h"
#include "zeroc/v1/inference.pb.h"

namespace zeroc {

// Of one position, in nats, from the best tokens of both distributions; all that either list leaves out is one group,
// so the figure is a little below the true one, never above. >= 0.
double GroupedKl(const v1::TokenLogprobs& exact, const v1::TokenLogprobs& packed);

class Audit {
 public:
  struct Config {
    double share = 0.01;                   // of the finished requests; 0: none
    std::uint64_t window_tokens = 20'000;  // measured of each profile, the last ones
    std::uint64_t tokens_min = 500;        // that make a judgement
    std::size_t pending_max = 8;
    std::size_t tokens_max = 16'384;  // prompt + answer of a request that is worth its time
  };
  struct Sample {
    std::vector<std::uint32_t> prompt_ids;
    std::vector<std::uint32_t> output_ids;
    std::string profile;
  };
  struct Measured {
    double increase = 0;  // perplexity, absolute; the mean
    double low = 0, high = 0;
    std::uint64_t n_tokens = 0;
  };

  // `ladder` outlives the audit.
  Audit(const Config& config, std::span<const Rung> ladder, double ppl_base, std::uint64_t seed);

  // A request has been served well. Kept with the probability `share`; the oldest makes room.
  void Offer(Sample sample);
  // The next one to score, with the profile to score: its own, or in turn one that is ruled out and would not come up
  // otherwise.
  std::optional<Sample> Take();
  // Per token.
  void Add(const std::string& profile, std::span<const double> kl);

  // Of every rung: what is measured, where that has taken the promise's place. For PolicyInput::audited.
  std::vector<std::optional<double>> Excess() const;
  std::optional<Measured> Of(const std::string& profile) const;

 private:
  struct Batch {
    std::uint64_t n = 0;
    double sum = 0, squares = 0;
  };
  struct Record {
    std::deque<Batch> batches;  // one for each request
    Batch total;
    bool raised = false;
    std::uint64_t touched = 0;
  };
  Measured Judge(const Record& record) const;

  const Config config_;
  const std::span<const Rung> ladder_;
  const double ppl_base_;
  mutable Mutex mu_;
  std::mt19937_64 random_ ZEROC_GUARDED_BY(mu_);
  std::deque<Sample> pending_ ZEROC_GUARDED_BY(mu_);
  std::map<std::string, Record> records_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t n_taken_ ZEROC_GUARDED_BY(mu_) = 0;
};

}  // namespace zeroc
