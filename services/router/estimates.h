// What the router has measured of its workers and of the links between them: exponentially weighted, from what every
// finished transfer and answer reports. Nothing is assumed before the first measurements.
//
// Thread-safe. Bounded: of workers that come and go, the ones heard of longest ago are forgotten.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "services/router/policy.h"

namespace zeroc {

// A straight line through points, each counting `kKeep` times what the next one does.
class LineEstimate {
 public:
  static constexpr double kKeep = 0.95;  // about the last 20 points
  // What to say when all x are nearly the same: that y is proportional to x, or that it does not depend on it.
  enum class Flat { kProportional, kConstant };

  explicit LineEstimate(Flat flat) : flat_(flat) {}
  // Ignores what is not finite or negative: the points are foreign.
  void Add(double x, double y);
  int n() const { return n_; }
  Line Fit() const;
  // The mean of y over the mean of x; 0 without points.
  double Ratio() const { return x_ > 0 ? y_ / x_ : 0; }

 private:
  Flat flat_;
  int n_ = 0;
  double w_ = 0, x_ = 0, y_ = 0, xx_ = 0, xy_ = 0;  // weighted sums
};

class Estimates {
 public:
  // So many points make an estimate.
  static constexpr int kPointsMin = 3;

  struct Transfer {
    std::string prefill, decode;  // names
    std::uint64_t n_tokens = 0;   // computed, by all ranks
    double prefill_seconds = 0;
    std::uint64_t wire_bytes = 0;
    double wire_seconds = 0;    // something was under way
    double hidden_seconds = 0;  // .. while prefill computed
    std::uint32_t n_ranks = 1;  // of the worker's group, that computed and sent together
  };
  void AddTransfer(const Transfer& transfer);
  // decode_seconds: from admission to the last token, n_tokens of them. kv_bytes: of the prompt, resident.
  void AddDecode(const std::string& decode, std::uint64_t n_tokens, double decode_seconds, std::uint64_t kv_bytes);
  void AddOutputLength(std::uint64_t n_tokens);

  // A pair that was never measured is taken to be like the average of all.
  std::optional<LinkView> Link(const std::string& prefill, const std::string& decode, std::uint32_t n_ranks = 1) const;
  // By tokens that n_ranks compute together. What was never measured with so many ranks is taken to share the work
  // evenly, as the worker itself does with other numbers of ranks, else as all workers do.
  std::optional<Line> PrefillSeconds(const std::string& prefill, std::uint32_t n_ranks = 1) const;
  std::optional<Line> TokenSeconds(const std::string& decode) const;
  std::optional<double> RequestDecodeSeconds(const std::string& decode) const;
  // The usual length of answers, at most max_tokens; max_tokens while nothing is known.
  double ExpectedOutput(std::uint32_t max_tokens) const;

 private:
  struct Pair {
    LineEstimate seconds{LineEstimate::Flat::kProportional};
    LineEstimate hidden{LineEstimate::Flat::kProportional};  // by what could be hidden
    std::uint64_t touched = 0;
  };
  struct Prefill {
    LineEstimate seconds{LineEstimate::Flat::kProportional};  // by tokens of a rank
    std::uint64_t touched = 0;
  };
  static constexpr std::uint32_t kAnyRanks = 0;
  struct Decode {
    LineEstimate token_seconds{LineEstimate::Flat::kConstant};
    LineEstimate request_seconds{LineEstimate::Flat::kConstant};
    std::uint64_t touched = 0;
  };
  template <typename Map>
  typename Map::mapped_type& Touch(Map& map, const typename Map::key_type& key) ZEROC_REQUIRES(mu_);

  mutable Mutex mu_;
  std::uint64_t clock_ ZEROC_GUARDED_BY(mu_) = 0;
  std::map<std::tuple<std::string, std::uint32_t, std::string>, Pair> pairs_ ZEROC_GUARDED_BY(mu_);  // with the ranks
  std::map<std::pair<std::string, std::uint32_t>, Prefill> prefills_ ZEROC_GUARDED_BY(mu_);          // ranks, or any
  std::map<std::string, Decode> decodes_ ZEROC_GUARDED_BY(mu_);
  Pair any_pair_ ZEROC_GUARDED_BY(mu_);
  Prefill any_prefill_ ZEROC_GUARDED_BY(mu_);
  Decode any_decode_ ZEROC_GUARDED_BY(mu_);
  LineEstimate output_ ZEROC_GUARDED_BY(mu_){LineEstimate::Flat::kConstant};
};

}  // namespace zeroc
