#include "libzeroc/model/sp_scheme.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "libzeroc/compression/profile.h"
#include "libzeroc/model/sp_wire.h"

namespace zeroc {
namespace {

std::shared_ptr<const KvFormat> Format(int bits, int n_heads, int n_kv_heads, int head_dim, int n_layers = 1) {
  const ModelGeometry geometry{n_layers, n_heads, n_kv_heads, head_dim, n_heads * head_dim};
  return KvFormat::FromProfile(geometry, UniformProfile("test", bits, n_layers, head_dim), 16).value();
}

TEST(SpScheme, NamesAreRead) {
  for (const auto scheme :
       {SpScheme::kAuto, SpScheme::kAllGather, SpScheme::kRing, SpScheme::kUlysses, SpScheme::kUlysses8}) {
    EXPECT_EQ(SpSchemeFromName(SpSchemeName(scheme)).value(), scheme);
  }
  const Status status = SpSchemeFromName("star").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("allgather"), std::string_view::npos);
}

TEST(SpScheme, EveryQueryHeadHasOneRank) {
  for (const auto& [n_heads, n_kv_heads] : {std::pair{8, 2}, {8, 8}, {4, 1}, {6, 3}, {32, 8}}) {
    for (int n_ranks = 1; n_ranks <= 12; ++n_ranks) {
      std::vector<int> times(static_cast<std::size_t>(n_heads));
      int n_copies = 0;
      for (int rank = 0; rank < n_ranks; ++rank) {
        for (const HeadShare& share : HeadsOf(rank, n_ranks, n_heads, n_kv_heads)) {
          ++n_copies;
          for (int h = 0; h < share.n; ++h) {
            ++times[static_cast<std::size_t>(share.kv_head * (n_heads / n_kv_heads) + share.first + h)];
          }
        }
      }
      EXPECT_EQ(times, std::vector<int>(static_cast<std::size_t>(n_heads), 1)) << n_heads << " " << n_ranks;
      EXPECT_EQ(n_copies, std::min(n_heads, std::max(n_ranks, n_kv_heads))) << n_heads << " " << n_ranks;
    }
  }
}

// Published volumes: Llama-3.1-8B, 32k tokens, MB per worker and layer, bf16 and windows apart.
TEST(SpScheme, BytesOfALlama8B) {
  const auto bf16 = Format(16, 32, 8, 128);
  const auto mb = [&](SpScheme scheme, const KvFormat& format, int n_ranks) {
    return PredictSpBytes(scheme, format, 32, 32768, n_ranks, 2, true).total() / 1e6;
  };
  EXPECT_NEAR(mb(SpScheme::kAllGather, *bf16, 2), 67.1, 0.05);
  EXPECT_NEAR(mb(SpScheme::kRing, *bf16, 4), 100.7, 0.05);
  EXPECT_NEAR(mb(SpScheme::kAllGather, *bf16, 8), 117.4, 0.05);
  // Outputs come with 4 bytes of log-sum-exp per head and token: 1.5 % of their size.
  EXPECT_NEAR(mb(SpScheme::kUlysses, *bf16, 2), 167.8, 167.8 * 0.011);
  EXPECT_NEAR(mb(SpScheme::kUlysses, *bf16, 16), 47.2, 47.2 * 0.011);
  const auto q3 = Format(3, 32, 8, 128);
  for (const int n_ranks : {2, 3, 4}) {
    EXPECT_GT(mb(SpScheme::kAllGather, *bf16, n_ranks) / mb(SpScheme::kAllGather, *q3, n_ranks), 4.5) << n_ranks;
  }
}

TEST(SpScheme, AutoTakesTheFewerBytes) {
  const auto choose = [](const KvFormat& format, int n_heads, int n_ranks) {
    return ResolveSpScheme(SpScheme::kAuto, format, n_heads, 32768, n_ranks, 2);
  };
  const auto gqa = Format(16, 32, 8, 128, 32), mha = Format(16, 32, 32, 128, 32), packed = Format(3, 32, 8, 128, 32);
  EXPECT_EQ(choose(*gqa, 32, 4), SpScheme::kAllGather);  // P G < H + max(G, P): P < 5
  EXPECT_EQ(choose(*gqa, 32, 6), SpScheme::kUlysses);
  EXPECT_EQ(choose(*mha, 32, 4), SpScheme::kUlysses);
  EXPECT_EQ(choose(*packed, 32, 6), SpScheme::kAllGather);  // packed blocks move the border far away
  EXPECT_EQ(ResolveSpScheme(SpScheme::kRing, *gqa, 32, 100, 4, 2), SpScheme::kRing);
}

TEST(SpWire, RowsComeBack) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  constexpr int kDim = 48;
  float row[kDim], back[kDim];
  std::byte bytes[4 * kDim + 4];
  for (float& x : row) x = normal(rng);
  float largest = 0;
  for (const float x : row) largest = std::max(largest, std::fabs(x));
  EncodeSpRow(SpScheme::kUlysses, 4, row, kDim, bytes);
  DecodeSpRow(SpScheme::kUlysses, 4, bytes, kDim, back);
  EXPECT_TRUE(std::equal(row, row + kDim, back));
  for (const auto& [scheme, bound] :
       {std::pair{SpScheme::kUlysses, largest / 256}, {SpScheme::kUlysses8, largest / 254}}) {
    EncodeSpRow(scheme, 2, row, kDim, bytes);
    DecodeSpRow(scheme, 2, bytes, kDim, back);
    for (int i = 0; i < kDim; ++i) EXPECT_NEAR(row[i], back[i], bound * 1.0001F);
  }
  // What is not a number does not become one.
  row[5] = std::numeric_limits<float>::quiet_NaN();
  EncodeSpRow(SpScheme::kUlysses8, 2, row, kDim, bytes);
  DecodeSpRow(SpScheme::kUlysses8, 2, bytes, kDim, back);
  EXPECT_TRUE(std::isnan(back[5]));
  std::fill_n(row, kDim, 0.0F);
  EncodeSpRow(SpScheme::kUlysses8, 2, row, kDim, bytes);
  DecodeSpRow(SpScheme::kUlysses8, 2, bytes, kDim, back);
  EXPECT_TRUE(std::equal(row, row + kDim, back));
}

}  // namespace
}  // namespace zeroc
