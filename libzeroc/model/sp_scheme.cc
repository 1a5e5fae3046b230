#include "libzeroc/model/sp_scheme.h"

#include <algorithm>
#include <array>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/kv/sp_split.h"

namespace zeroc {
namespace {

constexpr std::array<std::pair<SpScheme, std::string_view>, 5> kNames = {{{SpScheme::kAuto, "auto"},
                                                                          {SpScheme::kAllGather, "allgather"},
                                                                          {SpScheme::kRing, "ring"},
                                                                          {SpScheme::kUlysses, "ulysses"},
                                                                          {SpScheme::kUlysses8, "ulysses8"}}};

bool MovesHeads(SpScheme scheme) { return scheme == SpScheme::kUlysses || scheme == SpScheme::kUlysses8; }

}  // namespace

std::string_view SpSchemeName(SpScheme scheme) {
  for (const auto& [known, name] : kNames) {
    if (known == scheme) return name;
  }
  ZEROC_CHECK(false, static_cast<int>(scheme));
  return {};
}

Result<SpScheme> SpSchemeFromName(std::string_view name) {
  std::string all;
  for (const auto& [scheme, known] : kNames) {
    if (known == name) return scheme;
    all += (all.empty() ? "" : ", ") + std::string(known);
  }
  return InvalidArgument("sequence-parallel scheme '" + std::string(name) + "': it is one of " + all);
}

std::vector<HeadShare> HeadsOf(int rank, int n_ranks, int n_heads, int n_kv_heads) {
  const int group = n_heads / n_kv_heads;
  std::vector<HeadShare> shares;
  if (n_ranks <= n_kv_heads) {
    for (int g = n_kv_heads * rank / n_ranks; g < n_kv_heads * (rank + 1) / n_ranks; ++g)
      shares.push_back({g, 0, group});
    return shares;
  }
  const int kv_head = rank * n_kv_heads / n_ranks;
  int n_before = 0, n_same = 0;  // ranks of the same KV head
  for (int other = 0; other < n_ranks; ++other) {
    if (other * n_kv_heads / n_ranks != kv_head) continue;
    ++n_same;
    if (other < rank) ++n_before;
  }
  const int first = group * n_before / n_same, end = group * (n_before + 1) / n_same;
  if (first < end) shares.push_back({kv_head, first, end - first});
  return shares;
}

std::int64_t QueryRowBytes(SpScheme scheme, int head_dim, int act_bytes) {
  return scheme == SpScheme::kUlysses8 ? std::int64_t{head_dim} + 4 : std::int64_t{head_dim} * act_bytes;
}

std::int64_t OutputRowBytes(SpScheme scheme, int head_dim, int act_bytes) {
  return QueryRowBytes(scheme, head_dim, act_bytes) + 4;
}

SpBytes PredictSpBytes(SpScheme scheme, const KvFormat& format, int n_heads, int n_tokens, int n_ranks, int act_bytes,
                       bool all_logits) {
  ZEROC_CHECK(scheme != SpScheme::kAuto && n_ranks >= 1);
  const double n = n_tokens, p = n_ranks;
  const double n_lasting = format.packs ? CountLastingBlocks(format, n_tokens) * kernels::kBlockTokens : n;
  double block = 0, heads = 0, window = 0;  // bytes, all layers
  // Blocks that the first query of a chunk sees exact, of those before the chunk.
  const int n_exact = (format.recent_tokens + kernels::kBlockTokens - 1) / kernels::kBlockTokens;
  for (std::size_t l = 0; l < static_cast<std::size_t>(format.n_layers); ++l) {
    const kernels::KvBlockLayout& lasting = format.packs ? format.tiers.back().layouts[l] : format.exact;
    block += lasting.block_bytes;
    heads += double{1} * lasting.head_bytes * format.n_kv_heads;
    if (!format.packs) continue;
    window += double{1} * n_exact * format.exact.block_bytes;
    int n_seen = n_exact;  // later queries of the chunk see the younger blocks in the tier as well
    for (std::size_t t = 0; t + 1 < format.tiers.size(); ++t) {
      n_seen += format.tiers[t].n_blocks;
      window += double{1} * n_seen * format.tiers[t].layouts[l].block_bytes;
    }
  }
  SpBytes bytes;
  if (format.packs) {
    bytes.windows = (2 * p - 2) / p * window;
    if (format.sink_tokens > 0) bytes.windows += (p - 1) / p * format.n_layers * format.sink.block_bytes;
  }
  if (!MovesHeads(scheme)) {
    bytes.blocks = (p - 1) * n_lasting / p * block / kernels::kBlockTokens;
    return bytes;
  }
  const int n_query_layers = all_logits ? format.n_layers : format.n_layers - 1;
  const double moved = (p - 1) / p * n_query_layers * n / p * n_heads;
  const double copies = std::max<double>(format.n_kv_heads, p) / format.n_kv_heads;
  bytes.blocks = (p - 1) / p * n_lasting / p * copies * heads / kernels::kBlockTokens;
  bytes.queries = moved * static_cast<double>(QueryRowBytes(scheme, format.head_dim, act_bytes));
  bytes.outputs = moved * static_cast<double>(OutputRowBytes(scheme, format.head_dim, act_bytes));
  return bytes;
}

SpScheme ResolveSpScheme(SpScheme scheme, const KvFormat& format, int n_heads, int n_tokens, int n_ranks,
                         int act_bytes) {
  if (scheme != SpScheme::kAuto) return scheme;
  const auto total = [&](SpScheme of) {
    return PredictSpBytes(of, format, n_heads, n_tokens, n_ranks, act_bytes, /*all_logits=*/false).total();
  };
  return total(SpScheme::kUlysses) < total(SpScheme::kAllGather) ? SpScheme::kUlysses : SpScheme::kAllGather;
}

}  // namespace zeroc
