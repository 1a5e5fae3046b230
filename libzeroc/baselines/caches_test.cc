// What each cache stores, evicts and counts, against float64 attention over what its paper says it holds.
#include <gmock/gmock.h>

#include <algorithm>
#include <functional>

#include "libzeroc/baselines/cache_driver_testing.h"
#include "libzeroc/baselines/evicting_caches.h"
#include "libzeroc/baselines/low_rank_caches.h"
#include "libzeroc/baselines/quantized_caches.h"
#include "libzeroc/baselines/quantizers.h"

namespace zeroc {
namespace {

using testing::kShape;
using testing::Range;
using testing::Stream;

constexpr int kD = kShape.head_dim;
constexpr double kTolerance = 2e-5;  // float32 sums over a few hundred tokens of unit values

using Cache = std::unique_ptr<SequenceAttention>;
using MakeCache = std::function<Cache(int max_tokens)>;

Projection Identity(int dim, int rank) {
  Projection p{dim, rank, std::vector<float>(static_cast<std::size_t>(dim * rank))};
  for (int i = 0; i < rank; ++i) p.basis[static_cast<std::size_t>(i * rank + i)] = 1;
  return p;
}

std::shared_ptr<const PaluBases> PaluIdentity(int rank) {
  auto bases = std::make_shared<PaluBases>();
  bases->group = 2;
  bases->k.assign(static_cast<std::size_t>(kShape.n_layers), Identity(2 * kD, rank));
  bases->v = bases->k;
  return bases;
}

std::shared_ptr<const PaperBases> PaperIdentity(int rank) {
  auto bases = std::make_shared<PaperBases>();
  bases->k.assign(static_cast<std::size_t>(kShape.n_layers * kShape.n_kv_heads), Identity(kD, rank));
  bases->v = bases->k;
  return bases;
}

struct Named {
  const char* name;
  MakeCache make;
};

std::vector<Named> AllCaches() {
  return {{"exact", [](int n) { return NewExactCache(kShape, n); }},
          {"fp8", [](int n) { return NewFp8Cache(kShape, n); }},
          {"int8", [](int n) { return NewInt8Cache(kShape, n); }},
          {"kivi2", [](int n) { return NewKiviCache(kShape, n, 2); }},
          {"hack", [](int n) { return NewHackCache(kShape, n); }},
          {"h2o", [](int n) { return NewH2oCache(kShape, n, 40); }},
          {"snapkv", [](int n) { return NewSnapKvCache(kShape, n, 0.3); }},
          {"palu", [](int n) { return NewPaluCache(kShape, n, PaluIdentity(30)); }},
          {"paper", [](int n) { return NewPaperCache(kShape, n, PaperIdentity(20)); }}};
}

// Expects one output row of query head `head` to be `want`.
void ExpectRow(const std::vector<float>& rows, int row, int head, const std::vector<double>& want) {
  for (int i = 0; i < kD; ++i) {
    const int at = (row * kShape.n_heads + head) * kD + i;
    ASSERT_NEAR(rows[static_cast<std::size_t>(at)], want[static_cast<std::size_t>(i)], kTolerance)
        << row << ' ' << head;
  }
}

TEST(CacheAttention, AStepOfManyDecodedTokensIsManySteps) {
  for (const Named& item : AllCaches()) {
    SCOPED_TRACE(item.name);
    Stream stream(kShape, 330);
    const Cache whole = item.make(330), single = item.make(330);
    for (const Cache* cache : {&whole, &single}) {
      stream.Step(**cache, 0, 128);
      stream.Step(**cache, 128, 70);
      (*cache)->EndPrompt();
    }
    const auto many = stream.Step(*whole, 198, 132);
    for (int t = 198; t < 330; ++t) {
      const auto one = stream.Step(*single, t, 1);
      for (int layer = 0; layer < kShape.n_layers; ++layer) {
        const auto l = static_cast<std::size_t>(layer);
        ASSERT_TRUE(std::equal(one[l].begin(), one[l].end(), many[l].begin() + (t - 198) * stream.q_width())) << t;
      }
    }
    EXPECT_EQ(whole->HeldBytes(), single->HeldBytes());
    EXPECT_EQ(whole->n_tokens(), 330);
  }
}

// Chunks of the prompt do not change what a method holds, except where a method's own partitions fall (HACK).
TEST(CacheAttention, PromptChunksDoNotMatter) {
  for (const Named& item : AllCaches()) {
    SCOPED_TRACE(item.name);
    Stream stream(kShape, 200);
    const Cache a = item.make(200), b = item.make(200);
    stream.Step(*a, 0, 192);
    stream.Step(*b, 0, 64);
    stream.Step(*b, 64, 128);
    a->EndPrompt();
    b->EndPrompt();
    EXPECT_EQ(a->HeldBytes(), b->HeldBytes());
    EXPECT_EQ(stream.Step(*a, 192, 8), stream.Step(*b, 192, 8));
  }
}

TEST(ExactCache, AttendsToEverythingAndCountsIt) {
  Stream stream(kShape, 150);
  const Cache cache = NewExactCache(kShape, 150);
  const auto prompt = stream.Step(*cache, 0, 149);
  cache->EndPrompt();
  const auto last = stream.Step(*cache, 149, 1);
  for (int layer = 0; layer < kShape.n_layers; ++layer) {
    for (int head = 0; head < kShape.n_heads; ++head) {
      const auto key = [&](int t) { return stream.K(layer, t, head / 2); };
      const auto value = [&](int t) { return stream.V(layer, t, head / 2); };
      const auto l = static_cast<std::size_t>(layer);
      for (const int t : {0, 1, 23, 24, 148}) {
        ExpectRow(prompt[l], t, head, stream.Attend(layer, t, head, Range(t + 1), key, value));
      }
      ExpectRow(last[l], 0, head, stream.Attend(layer, 149, head, Range(150), key, value));
    }
  }
  EXPECT_EQ(cache->HeldBytes(), 150u * 2 * 2 * 2 * kD * 4);  // tokens, layers, heads, K and V, numbers of 4 bytes
}

TEST(ExactCache, RoundsToBf16BesideABf16Engine) {
  CacheShape shape = kShape;
  shape.exact_bytes = 2;
  Stream stream(shape, 1);
  stream.V(0, 0, 0)[0] = 1.0f + 0x1p-10f;  // not a bf16
  const Cache cache = NewExactCache(shape, 1);
  const auto out = stream.Step(*cache, 0, 1);
  EXPECT_EQ(out[0][0], 1.0f);
  EXPECT_EQ(cache->HeldBytes(), 1u * 2 * 2 * 2 * kD * 2);
}

// The prompt attends exactly; the next token sees every stored row rounded.
TEST(TokenwiseCaches, PromptIsExactDecodeReadsCodes) {
  const auto fp8 = [](std::vector<float> row) {
    for (float& x : row) x = RoundToE4m3(x);
    return row;
  };
  const auto int8 = [](std::vector<float> row) {
    QuantizeSymmetric8(row);
    return row;
  };
  const std::tuple<MakeCache, std::function<std::vector<float>(std::vector<float>)>, std::uint64_t> cases[] = {
      {[](int n) { return NewFp8Cache(kShape, n); }, fp8, 2 * kD},
      {[](int n) { return NewInt8Cache(kShape, n); }, int8, 2 * (kD + 2)}};
  for (const auto& [make, round, bytes] : cases) {
    Stream stream(kShape, 71);
    const Cache cache = make(71);
    const auto prompt = stream.Step(*cache, 0, 70);
    cache->EndPrompt();
    const auto last = stream.Step(*cache, 70, 1);
    const auto exact_key = [&](int t) { return stream.K(1, t, 1); };
    const auto exact_value = [&](int t) { return stream.V(1, t, 1); };
    ExpectRow(prompt[1], 69, 3, stream.Attend(1, 69, 3, Range(70), exact_key, exact_value));
    const auto key = [&](int t) { return round({stream.K(1, t, 1), stream.K(1, t, 1) + kD}); };
    const auto value = [&](int t) { return round({stream.V(1, t, 1), stream.V(1, t, 1) + kD}); };
    ExpectRow(last[1], 0, 3, stream.Attend(1, 70, 3, Range(71), key, value));
    EXPECT_EQ(cache->HeldBytes(), 71u * 2 * 2 * bytes);
  }
}

// KIVI's rules written out: after n tokens, keys below floor(n / 128) * 128 and values below n - 128 are codes.
TEST(KiviCache, HoldsWhatThePaperSays) {
  constexpr int kPrompt = 300, kEnd = 390;
  Stream stream(kShape, kEnd);
  const Cache cache = NewKiviCache(kShape, kEnd, 2);
  stream.Step(*cache, 0, kPrompt);
  cache->EndPrompt();
  std::vector<std::vector<float>> out;
  for (int t = kPrompt; t < kEnd; ++t) out.push_back(stream.Step(*cache, t, 1)[1]);

  // 3 of 4 levels per group, the group's minimum and maximum kept up to half precision.
  const auto affine = [](const std::vector<float>& group, float x) {
    const auto [low, high] = std::minmax_element(group.begin(), group.end());
    const float scale = RoundToHalf((*high - *low) / 3), zero = RoundToHalf(*low);
    return zero + scale * std::clamp(std::nearbyint((x - zero) / scale), 0.0f, 3.0f);
  };
  for (const int t : {kPrompt, 383, 384, kEnd - 1}) {  // 384 = 3 * 128: the keys of token 383's step go then
    const int held = t;                                // tokens before this step
    const auto key = [&](int token) {
      std::vector<float> row(stream.K(1, token, 0), stream.K(1, token, 0) + kD);
      if (token >= held / 128 * 128) return row;
      for (int i = 0; i < kD; ++i) {
        std::vector<float> group;
        for (int j = token / 32 * 32; j < token / 32 * 32 + 32; ++j) group.push_back(stream.K(1, j, 0)[i]);
        row[static_cast<std::size_t>(i)] = affine(group, row[static_cast<std::size_t>(i)]);
      }
      return row;
    };
    const auto value = [&](int token) {
      std::vector<float> row(stream.V(1, token, 0), stream.V(1, token, 0) + kD);
      if (token >= held - 128) return row;
      const std::vector<float> group = row;  // 32 channels: one group
      for (float& x : row) x = affine(group, x);
      return row;
    };
    ExpectRow(out[static_cast<std::size_t>(t - kPrompt)], 0, 1, stream.Attend(1, t, 1, Range(t + 1), key, value));
  }
  // 384 keys and 262 values as codes of 2 bits; groups of 32 take 8 bytes of codes and 4 of scale and zero.
  const std::uint64_t head = 384 / 32 * kD * 12 + 6 * kD * 4 + 262 * (kD / 32) * 12 + 128 * kD * 4;
  EXPECT_EQ(cache->HeldBytes(), 4 * head);
}

// The formula of the paper on integers: with x = a x' + b per partition, the product of two partitions of n numbers is
// aq ak sum q'k' + aq bk sum q' + bq ak sum k' + n bq bk. The cache computes the left side.
TEST(HackCache, IntegerProductsEqualProductsOfWhatTheyStandFor) {
  constexpr int n = 64;
  Stream stream({.n_layers = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = n, .exact_bytes = 4}, 20, 7);
  for (int t = 0; t < 20; ++t) {
    std::vector<float> q(stream.Q(0, t, 0), stream.Q(0, t, 0) + n), k(stream.K(0, t, 0), stream.K(0, t, 0) + n);
    const AffineCode qa = AffineOf({q.data(), n, 1}, 8, false), ka = AffineOf({k.data(), n, 1}, 2, true);
    std::int64_t qk = 0, q_sum = 0, k_sum = 0;
    for (int i = 0; i < n; ++i) {
      const int qc = EncodeAffine(qa, 8, q[static_cast<std::size_t>(i)]);
      const int kc = EncodeAffine(ka, 2, k[static_cast<std::size_t>(i)]);
      qk += qc * kc;
      q_sum += qc;
      k_sum += kc;
    }
    const double formula = double{qa.scale} * ka.scale * static_cast<double>(qk) +
                           double{qa.scale} * ka.zero * static_cast<double>(q_sum) +
                           double{qa.zero} * ka.scale * static_cast<double>(k_sum) + n * double{qa.zero} * ka.zero;
    QuantizeAffine({q.data(), n, 1}, 8, false);
    QuantizeAffine({k.data(), n, 1}, 2, true);
    double product = 0;
    for (int i = 0; i < n; ++i) product += double{q[static_cast<std::size_t>(i)]} * k[static_cast<std::size_t>(i)];
    EXPECT_NEAR(product, formula, 1e-4);
  }
}

TEST(HackCache, CodesEverywhereButTheLastValuePartition) {
  constexpr int kTokens = 140;
  Stream stream(kShape, kTokens);
  const Cache cache = NewHackCache(kShape, kTokens);
  const auto out = stream.Step(*cache, 0, kTokens);
  const int t = kTokens - 1;
  std::vector<float> q(stream.Q(1, t, 0), stream.Q(1, t, 0) + kD);
  for (float& x : q) x /= std::sqrt(static_cast<float>(kD));
  QuantizeAffine({q.data(), kD, 1}, 8, false);
  std::vector<float> p(kTokens);
  double sum = 0;
  for (int j = 0; j < kTokens; ++j) {
    std::vector<float> k(stream.K(1, j, 0), stream.K(1, j, 0) + kD);
    QuantizeAffine({k.data(), kD, 1}, 2);
    double score = 0;
    for (int i = 0; i < kD; ++i) score += double{q[static_cast<std::size_t>(i)]} * k[static_cast<std::size_t>(i)];
    sum += p[static_cast<std::size_t>(j)] = static_cast<float>(std::exp(score));
  }
  for (float& x : p) x = static_cast<float>(x / sum);
  QuantizeAffine({p.data(), 64, 1}, 8, false);
  QuantizeAffine({p.data() + 64, 64, 1}, 8, false);
  std::vector<double> want(kD);
  for (int i = 0; i < kD; ++i) {
    for (int block = 0; block < 3; ++block) {
      std::vector<float> column;
      for (int j = 64 * block; j < std::min(kTokens, 64 * (block + 1)); ++j) column.push_back(stream.V(1, j, 0)[i]);
      if (block < 2) QuantizeAffine({column.data(), 64, 1}, 2);
      for (std::size_t j = 0; j < column.size(); ++j) {
        want[static_cast<std::size_t>(i)] += double{p[static_cast<std::size_t>(64 * block) + j]} * column[j];
      }
    }
  }
  // A score at a rounding border may fall into the next 8-bit code: a 255th of the largest probability.
  for (int i = 0; i < kD; ++i) {
    EXPECT_NEAR(out[1][static_cast<std::size_t>(t * stream.q_width() + i)], want[static_cast<std::size_t>(i)], 2e-3);
  }
  // Keys: 8 bytes of codes and 6; value columns of 64 tokens: 16 and 6; 12 tokens exact.
  EXPECT_EQ(cache->HeldBytes(), 4u * (kTokens * 14 + 2 * kD * 22 + 12 * kD * 4));
}

// Token 5 draws half of everybody's attention; the budget keeps it, and the newest.
TEST(H2oCache, KeepsHeavyHittersAndTheNewest) {
  constexpr int kTokens = 100, kPrompt = 60, kBudget = 20;
  Stream stream(kShape, kTokens);
  for (int t = 0; t < kTokens; ++t) {
    for (int head = 0; head < kShape.n_heads; ++head) stream.Q(1, t, head)[0] = 6.0f;
    for (int head = 0; head < kShape.n_kv_heads; ++head) stream.K(1, t, head)[0] = t == 5 ? 8.0f : 0.0f;
  }
  const Cache cache = NewH2oCache(kShape, kTokens, kBudget);
  const auto prompt = stream.Step(*cache, 0, kPrompt);
  const auto key = [&](int t) { return stream.K(1, t, 0); };
  const auto value = [&](int t) { return stream.V(1, t, 0); };
  ExpectRow(prompt[1], kPrompt - 1, 0, stream.Attend(1, kPrompt - 1, 0, Range(kPrompt), key, value));
  EXPECT_EQ(cache->HeldBytes(), 4u * kPrompt * (2 * kD * 4 + 4));
  cache->EndPrompt();
  EXPECT_EQ(cache->HeldBytes(), 4u * kBudget * (2 * kD * 4 + 4));

  // The sums as the paper defines them: every query so far, both heads of the group, evicted keys left out.
  std::vector<int> kept = Range(kPrompt);
  std::vector<double> mass(kTokens);
  const auto add_mass = [&](int t, const std::vector<int>& tokens) {
    for (int head = 0; head < 2; ++head) {
      std::vector<double> p;
      double sum = 0;
      for (const int j : tokens) {
        double score = 0;
        for (int i = 0; i < kD; ++i) score += double{stream.Q(1, t, head)[i]} * stream.K(1, j, 0)[i];
        p.push_back(std::exp(score / std::sqrt(static_cast<double>(kD))));
        sum += p.back();
      }
      for (std::size_t j = 0; j < tokens.size(); ++j) mass[static_cast<std::size_t>(tokens[j])] += p[j] / sum;
    }
  };
  const auto evict_least = [&](int n_seen) {
    std::size_t least = kept.size();
    for (std::size_t j = 0; j < kept.size(); ++j) {
      if (kept[j] >= n_seen - kBudget / 2) continue;
      if (least == kept.size() || mass[static_cast<std::size_t>(kept[j])] < mass[static_cast<std::size_t>(kept[least])])
        least = j;
    }
    kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(least));
  };
  for (int t = 0; t < kPrompt; ++t) add_mass(t, Range(t + 1));
  while (static_cast<int>(kept.size()) > kBudget) evict_least(kPrompt);
  for (int t = kPrompt; t < kTokens; ++t) {
    const auto out = stream.Step(*cache, t, 1);
    kept.push_back(t);
    ExpectRow(out[1], 0, 0, stream.Attend(1, t, 0, kept, key, value));
    add_mass(t, kept);
    evict_least(t + 1);
    ASSERT_EQ(cache->HeldBytes(), 4u * kBudget * (2 * kD * 4 + 4));
  }
  EXPECT_THAT(kept, ::testing::Contains(5));
  EXPECT_EQ(cache->n_tokens(), kTokens);
}

TEST(SnapKvCache, VotesOfTheWindowPooledAndDecodedTokensStay) {
  constexpr int kPrompt = 120;
  Stream stream(kShape, kPrompt + 9);
  for (int t = 0; t < stream.n_tokens(); ++t) {
    for (int head = 0; head < kShape.n_heads; ++head) stream.Q(0, t, head)[0] = 8.0f;
    for (int head = 0; head < kShape.n_kv_heads; ++head) stream.K(0, t, head)[0] = t == 40 ? 12.0f : 0.0f;
  }
  const Cache cache = NewSnapKvCache(kShape, kPrompt + 9, 39.0 / kPrompt);  // the window, and 7 more
  stream.Step(*cache, 0, 50);
  stream.Step(*cache, 50, kPrompt - 50);
  cache->EndPrompt();
  EXPECT_EQ(cache->HeldBytes(), 4u * 39 * 2 * kD * 4);
  // Pooling over 7 makes the neighbours of token 40 win.
  std::vector<int> kept = {37, 38, 39, 40, 41, 42, 43};
  for (int t = kPrompt - kSnapKvWindow; t < kPrompt; ++t) kept.push_back(t);
  const auto key = [&](int t) { return stream.K(0, t, 1); };
  const auto value = [&](int t) { return stream.V(0, t, 1); };
  for (int t = kPrompt; t < kPrompt + 9; ++t) {
    const auto out = stream.Step(*cache, t, 1);
    kept.push_back(t);
    ExpectRow(out[0], 0, 2, stream.Attend(0, t, 2, kept, key, value));
  }
  EXPECT_EQ(cache->HeldBytes(), 4u * (39 + 9) * 2 * kD * 4);
}

TEST(SnapKvCache, SmallBudgetsAndShortPrompts) {
  Stream stream(kShape, 50);
  const Cache tiny = NewSnapKvCache(kShape, 50, 0.1);
  stream.Step(*tiny, 0, 40);
  tiny->EndPrompt();
  EXPECT_EQ(tiny->HeldBytes(), 4u * 4 * 2 * kD * 4);  // the last 4 tokens
  const Cache brief = NewSnapKvCache(kShape, 50, 0.5);
  stream.Step(*brief, 0, 10);  // shorter than the window
  brief->EndPrompt();
  EXPECT_EQ(brief->HeldBytes(), 4u * 5 * 2 * kD * 4);
  const Cache all = NewSnapKvCache(kShape, 50, 1.0);
  stream.Step(*all, 0, 40);
  all->EndPrompt();
  EXPECT_EQ(all->HeldBytes(), 4u * 40 * 2 * kD * 4);
}

TEST(PaluCache, DropsCoordinatesOfTheJointHeads) {
  constexpr int kTokens = 30;
  Stream stream(kShape, kTokens);
  const Cache full = NewPaluCache(kShape, kTokens, PaluIdentity(2 * kD));
  const Cache exact = NewExactCache(kShape, kTokens);
  const auto a = stream.Step(*full, 0, kTokens), b = stream.Step(*exact, 0, kTokens);
  EXPECT_EQ(a, b);
  EXPECT_EQ(full->HeldBytes(), exact->HeldBytes());

  constexpr int kRank = kD + 10;  // head 0 whole, 10 coordinates of head 1
  const Cache cut = NewPaluCache(kShape, kTokens, PaluIdentity(kRank));
  const auto c = stream.Step(*cut, 0, kTokens);
  const auto keep = [](const float* x, int n) {
    std::vector<float> row(x, x + kD);
    std::fill(row.begin() + n, row.end(), 0.0f);
    return row;
  };
  for (const int head : {1, 2}) {
    const int n = head == 1 ? kD : 10;
    const auto key = [&](int t) { return keep(stream.K(0, t, head / 2), n); };
    const auto value = [&](int t) { return keep(stream.V(0, t, head / 2), n); };
    ExpectRow(c[0], kTokens - 1, head, stream.Attend(0, kTokens - 1, head, Range(kTokens), key, value));
  }
  EXPECT_EQ(cut->HeldBytes(), 2u * kTokens * 2 * kRank * 4);
}

TEST(PaluCache, QuantisedLatentsShareOneScale) {
  constexpr int kTokens = 12, kRank = 40;
  Stream stream(kShape, kTokens);
  auto bases = std::make_shared<PaluBases>(*PaluIdentity(kRank));
  bases->code_bits = 3;
  const Cache cache = NewPaluCache(kShape, kTokens, bases);
  const auto out = stream.Step(*cache, 0, kTokens);
  // Both heads' rows are one latent of 40 numbers: head 0 and 8 coordinates of head 1.
  const auto codes = [](const float* head0, int head) {
    std::vector<float> latent(head0, head0 + kRank);
    QuantizeAffine({latent.data(), kRank, 1}, 3);
    latent.resize(2 * kD, 0.0f);
    return std::vector<float>(latent.begin() + head * kD, latent.begin() + (head + 1) * kD);
  };
  for (const int head : {0, 3}) {
    const auto key = [&](int t) { return codes(stream.K(1, t, 0), head / 2); };
    const auto value = [&](int t) { return codes(stream.V(1, t, 0), head / 2); };
    ExpectRow(out[1], kTokens - 1, head, stream.Attend(1, kTokens - 1, head, Range(kTokens), key, value));
  }
  EXPECT_EQ(cache->HeldBytes(), 2u * kTokens * 2 * (kRank * 3 / 8 + 4));
}

TEST(PaperCache, ColdTokensKeepHalf) {
  constexpr int kPrompt = 40;
  Stream stream(kShape, kPrompt + 1);
  // In the first layer tokens 8 .. 19 are looked at least: 12 of 40.
  for (int t = 0; t < kPrompt; ++t) {
    for (int head = 0; head < kShape.n_heads; ++head) stream.Q(0, t, head)[0] = 8.0f;
    for (int head = 0; head < kShape.n_kv_heads; ++head) stream.K(0, t, head)[0] = t >= 8 && t < 20 ? -12.0f : 0.0f;
  }
  const Cache cache = NewPaperCache(kShape, kPrompt + 1, PaperIdentity(24));
  stream.Step(*cache, 0, kPrompt);
  cache->EndPrompt();
  const auto out = stream.Step(*cache, kPrompt, 1);
  const auto cut = [](const float* x, int t) {
    std::vector<float> row(x, x + kD);
    std::fill(row.begin() + (t >= 8 && t < 20 ? 12 : 24), row.end(), 0.0f);
    return row;
  };
  const auto key = [&](int t) { return cut(stream.K(1, t, 1), t); };
  const auto value = [&](int t) { return cut(stream.V(1, t, 1), t); };
  ExpectRow(out[1], 0, 3, stream.Attend(1, kPrompt, 3, Range(kPrompt + 1), key, value));
  EXPECT_EQ(cache->HeldBytes(), 4u * 2 * (29 * 24 + 12 * 12) * 4 + (kPrompt + 1 + 7) / 8);
}

TEST(Evicting, PoolsAndPicks) {
  const float x[] = {1, 0, 0, 5, 0, 0, 0, 0, 2};
  EXPECT_THAT(MaxPool(x, 5), ::testing::ElementsAre(1, 5, 5, 5, 5, 5, 2, 2, 2));
  EXPECT_THAT(MaxPool(x, 1), ::testing::ElementsAreArray(x));
  const float y[] = {3, 1, 3, 2, 3};
  EXPECT_THAT(LargestIndices(y, 2), ::testing::ElementsAre(0, 2));
  EXPECT_THAT(LargestIndices(y, 4), ::testing::ElementsAre(0, 2, 3, 4));
  EXPECT_THAT(LargestIndices(y, 99), ::testing::ElementsAre(0, 1, 2, 3, 4));
  EXPECT_TRUE(LargestIndices(y, 0).empty());
}

}  // namespace
}  // namespace zeroc
