// Decode and prefill attention against the reference, one KV head and sequence at a time.
#include <algorithm>
#include <memory>

#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/cases/cases.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr KvScaleKind kShared = KvScaleKind::kShared;

// A stretch of a sequence in blocks of one layout, on the host for the reference and on the device. Rows from n_valid
// on are poisoned where the layout is exact.
class History {
 public:
  History(const KvBlockLayout& layout, int n_blocks, int n_valid, unsigned seed, float k_scale = 1.0f)
      : layout_(layout) {
    Random random(seed);
    const int n = layout.n_kv_heads * layout.head_dim;
    const bool exact = layout.k.runs[0].bits == 16 && layout.v.runs[0].bits == 16;
    const auto source =
        LayoutOf(layout.n_kv_heads, layout.head_dim, 64, {{16, layout.head_dim}}, {{16, layout.head_dim}}, false);
    bytes_.resize(static_cast<std::size_t>(n_blocks) * Stride(), 0xff);
    for (int b = 0; b < n_blocks; ++b) {
      auto k = random.Normals(64 * n, k_scale), v = random.Normals(64 * n);
      for (float& x : v) x += 0.5f;
      for (int t = 0; t < 64; ++t) {
        if (b * layout.n_tokens + t < n_valid) continue;
        std::fill_n(k.begin() + t * n, n, exact ? kNan : 100.0f);
        std::fill_n(v.begin() + t * n, n, exact ? kNan : 100.0f);
      }
      std::vector<std::uint8_t> block(static_cast<std::size_t>(source.block_bytes));
      std::uint8_t* blocks[] = {block.data()};
      std::uint8_t* to = bytes_.data() + static_cast<std::size_t>(b) * Stride();
      ReferenceOps().kv_write({k.data(), v.data(), n, 0, 64, 0, layout.n_kv_heads, {}, nullptr, &source, blocks});
      ReferenceOps().kv_pack({block.data(), &source, to, &layout_, 0, layout.n_kv_heads});
    }
    device_ = std::make_unique<Buffer<std::uint8_t>>(bytes_);
    for (int b = 0; b < n_blocks; ++b) {
      host_pointers_.push_back(bytes_.data() + static_cast<std::size_t>(b) * Stride());
      device_pointers_.push_back(device_->data() + static_cast<std::size_t>(b) * Stride());
    }
    device_table_ = std::make_unique<Buffer<const std::uint8_t*>>(device_pointers_);
  }
  KvSegment Host(int first_pos, int begin, int end) const {
    return Segment(host_pointers_.data(), first_pos, begin, end);
  }
  KvSegment Device(const KvSegment& host) const {
    KvSegment segment = host;
    segment.blocks = device_table_->data();
    return segment;
  }

 private:
  std::size_t Stride() const { return static_cast<std::size_t>(layout_.block_bytes + 15) / 16 * 16; }
  KvSegment Segment(const std::uint8_t* const* blocks, int first_pos, int begin, int end) const {
    return {blocks, static_cast<std::int32_t>(host_pointers_.size()), &layout_, first_pos, begin, end};
  }
  KvBlockLayout layout_;
  std::vector<std::uint8_t> bytes_;
  std::vector<const std::uint8_t*> host_pointers_, device_pointers_;
  std::unique_ptr<Buffer<std::uint8_t>> device_;
  std::unique_ptr<Buffer<const std::uint8_t*>> device_table_;
};

// What one sequence sees, as the reference and as the device take it.
struct Sequence {
  std::vector<KvSegment> host, device;
  int first_pos = 0, n_tokens = 1;

  void Add(const History& history, const KvSegment& segment, const std::vector<float>* mass = nullptr,
           const Buffer<float>* device_mass = nullptr) {
    host.push_back(segment);
    device.push_back(history.Device(segment));
    if (mass == nullptr) return;
    host.back().mass = mass->data();
    device.back().mass = device_mass->data();
  }
};

struct Heads {
  int n_heads, n_kv_heads, head_dim;
  int group() const { return n_heads / n_kv_heads; }
};

// Normalised rows [n_kv_heads, n_tokens, group, head_dim] of a sequence with their log-sum-exp (-inf: saw nothing).
struct Rows {
  std::vector<double> out, lse;
};

Rows ReferenceRows(const Sequence& sequence, const Heads& heads, const float* q) {
  Rows rows;
  const int n_rows = sequence.n_tokens * heads.group(), d = heads.head_dim;
  for (int head = 0; head < heads.n_kv_heads; ++head) {
    std::vector<float> out(static_cast<std::size_t>(n_rows * d)), top(static_cast<std::size_t>(n_rows)),
        sum(top.size());
    ReferenceOps().attention({q + std::int64_t{head} * n_rows * d, n_rows, heads.group(), d, sequence.first_pos, head,
                              sequence.host.data(), static_cast<std::int32_t>(sequence.host.size()), out.data(),
                              top.data(), sum.data(), nullptr});
    for (int r = 0; r < n_rows; ++r) {
      const auto at = static_cast<std::size_t>(r);
      rows.lse.push_back(sum[at] == 0.0f ? -double{kInf} : top[at] + std::log(double{sum[at]}));
      for (int i = 0; i < d; ++i) {
        rows.out.push_back(sum[at] == 0.0f
                               ? 0.0
                               : out[at * static_cast<std::size_t>(d) + static_cast<std::size_t>(i)] / double{sum[at]});
      }
    }
  }
  return rows;
}

// Errors of one score (q has norm about 1 and a key about sqrt(d), so the terms of a score have root-sum-square 1),
// and of a weighted mean of values, in units of 6, the largest. Six standard deviations and more, as there are many.
struct Errors {
  double score, value;
};
// q and probabilities are integers of units of 1 / 32512 of their largest, which is about three times the root mean
// square of q; codes of V span a range of up to 8, and the roundings of the probabilities (0.3 units, at most the sum
// that divides them) are independent. 1e-5 is the fast exponential.
Errors DecodeErrors(int dim, int n_tokens) {
  return {6 * 3 * 0.3 / 32512 + 64 * std::sqrt(dim) * kEps32, 6 * 0.3 / 32512 * std::sqrt(n_tokens) * 8 / 6 + 1e-5};
}

void CheckRows(const Rows& expected, const std::vector<double>& out, const std::vector<double>& lse, int dim,
               const Errors& errors, double rounding, Outcome& outcome) {
  for (std::size_t row = 0; row < expected.lse.size(); ++row) {
    if (!lse.empty()) outcome.Check(lse[row], expected.lse[row], errors.score + 2e-5);
    for (std::size_t i = row * static_cast<std::size_t>(dim); i < (row + 1) * static_cast<std::size_t>(dim); ++i) {
      // |V| is at most about 6 here; the weights err by twice a score's error, relative.
      const double bound = expected.lse[row] == -double{kInf} ? 0 : 6.0 * (2 * errors.score + errors.value) + 1e-5;
      outcome.Check(out[i], expected.out[i], bound + rounding * std::abs(expected.out[i]));
    }
  }
}

// The plan's arrays on the device.
struct DeviceTiles {
  explicit DeviceTiles(const AttentionTiles& plan)
      : tiles(plan.tiles), segments(plan.segments), items(plan.items), first_item(plan.first_item) {}
  Buffer<DeviceQueryTile> tiles;
  Buffer<DeviceSegment> segments;
  Buffer<DeviceItem> items;
  Buffer<std::int32_t> first_item;
};

// The sequences' queries one after another, and how many tokens these are.
std::vector<AttentionSequence> Ask(const std::vector<Sequence>& sequences, const Heads& heads, std::int64_t* n_tokens) {
  std::vector<AttentionSequence> asked;
  for (const Sequence& sequence : sequences) {
    const std::int64_t q_offset = *n_tokens * heads.n_heads * heads.head_dim;
    asked.push_back({sequence.device, sequence.first_pos, sequence.n_tokens, q_offset, *n_tokens});
    *n_tokens += sequence.n_tokens;
  }
  return asked;
}

// All sequences in one launch: parts against the reference in double, then the merge kernel against those.
void CheckDecode(const std::vector<Sequence>& sequences, const Heads& heads, const std::vector<float>& q,
                 int n_thread_blocks, const Errors& errors, Outcome& outcome) {
  const int d = heads.head_dim;
  std::int64_t n_tokens = 0;
  const std::vector<AttentionSequence> asked = Ask(sequences, heads, &n_tokens);
  AttentionTiles plan;
  outcome.Expect(
      MakeDecodeTiles(asked, heads.n_heads, heads.n_kv_heads, d, n_thread_blocks, &plan) == KernelStatus::kOk, "plan");
  const DeviceTiles device(plan);
  const auto n_rows = static_cast<std::size_t>(plan.n_parts) * kDecodeTileRows;
  const Buffer<float> device_q(q), out(n_rows * static_cast<std::size_t>(d)), row_max(n_rows), row_sum(n_rows);
  outcome.Done(
      DecodeAttention({device_q.data(), device.tiles.data(), device.segments.data(), device.items.data(),
                       device.first_item.data(), plan.layouts.data(), static_cast<std::int32_t>(plan.layouts.size()),
                       n_thread_blocks, d, out.data(), row_max.data(), row_sum.data()},
                      nullptr));
  const std::int64_t dst_stride = heads.n_heads * d + 4;
  const Buffer<Bf16> dst(std::vector<Bf16>(static_cast<std::size_t>(n_tokens * dst_stride), FloatToBf16(-7.0f)));
  outcome.Done(DecodeMerge({device.tiles.data(), static_cast<std::int32_t>(plan.tiles.size()), d, out.data(),
                            row_max.data(), row_sum.data(), dst.data(), dst_stride},
                           nullptr));
  const auto parts = out.ToHost(), maxima = row_max.ToHost(), sums = row_sum.ToHost();
  const auto merged = dst.ToHost();
  std::size_t tile_idx = 0;
  std::int64_t q_offset = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const Rows expected = ReferenceRows(sequences[s], heads, q.data() + q_offset);
    q_offset += std::int64_t{sequences[s].n_tokens} * heads.n_heads * d;
    Rows got;
    std::vector<double> from_merge;
    const std::size_t first_out = got.out.size();
    for (int left = sequences[s].n_tokens * heads.n_heads; left > 0; ++tile_idx) {
      const DeviceQueryTile& tile = plan.tiles[tile_idx];
      left -= tile.n_rows;
      for (int r = 0; r < tile.n_rows; ++r) {
        double top = -double{kInf}, sum = 0;
        std::vector<double> total(static_cast<std::size_t>(d), 0.0);
        const auto at = [&](int part) {
          const int row = (tile.first_part + part) * kDecodeTileRows + r;
          return static_cast<std::size_t>(row);
        };
        for (int p = 0; p < tile.n_parts; ++p)
          top = std::isnan(maxima[at(p)]) ? kNan : std::max(top, double{maxima[at(p)]});
        for (int p = 0; p < tile.n_parts; ++p) {
          const double weight = maxima[at(p)] == -kInf ? 0 : std::exp(maxima[at(p)] - top);
          sum += weight * sums[at(p)];
          for (std::size_t i = 0; i < total.size(); ++i) total[i] += weight * parts[at(p) * total.size() + i];
        }
        got.lse.push_back(sum == 0 ? -double{kInf} : top + std::log(sum));
        for (const double x : total) got.out.push_back(sum == 0 ? 0 : x / sum);
        const int row = tile.first_row + r;
        const std::int64_t to = (tile.dst_token + row / heads.group()) * dst_stride +
                                (tile.kv_head * heads.group() + row % heads.group()) * d;
        for (int i = 0; i < d; ++i) from_merge.push_back(Bf16ToFloat(merged[static_cast<std::size_t>(to + i)]));
      }
    }
    CheckRows(expected, got.out, got.lse, d, errors, 0, outcome);
    for (std::size_t i = first_out; i < got.out.size(); ++i) {
      const double bound = 1.01 * kEpsBf16 * std::abs(got.out[i]) + 2e-5;
      outcome.Expect(std::isnan(got.out[i]) ? std::isnan(from_merge[i]) : std::abs(from_merge[i] - got.out[i]) <= bound,
                     "merge");
    }
  }
  for (std::int64_t t = 0; t < n_tokens; ++t) {
    outcome.Expect(merged[static_cast<std::size_t>(t * dst_stride + heads.n_heads * d)] == FloatToBf16(-7.0f),
                   "behind a row");
  }
}

struct Shape {
  std::vector<KvRun> k, v;
};
std::vector<Shape> ShapesOf(int d) {
  std::vector<Shape> shapes;
  for (const int bits : {16, 8, 4, 3, 2, 1}) shapes.push_back({{{bits, d}}, {{bits, d}}});
  shapes.push_back({{{8, 16}, {4, d - 32}, {0, 16}}, {{3, d - 16}, {2, 16}}});
  shapes.push_back({{{4, 16}, {3, 16}, {2, d - 32}}, {{16, 16}, {4, d - 48}, {0, 16}, {1, 16}}});
  shapes.push_back({{{0, d}}, {{4, d}}});
  // Heads that begin at any byte.
  shapes.push_back({{{4, 16, kShared}, {2, d - 16, kShared}}, {{3, 32, kShared}, {1, d - 32, kShared}}});
  return shapes;
}

void DecodeShapesCase(Outcome& outcome) {
  for (const int dim : {64, 80, 128}) {
    unsigned seed = 100;
    for (const Shape& shape : ShapesOf(dim)) {
      const int group = seed % 2 == 0 ? 4 : 3;
      const Heads heads = {group * 3, 3, dim};
      const auto layout = LayoutOf(3, dim, 64, shape.k, shape.v, seed % 3 != 0);
      const History history(layout, 2, 128, ++seed);
      Sequence sequence = {.first_pos = 127 - (dim == 80 ? 2 : 0), .n_tokens = dim == 80 ? 3 : 1};
      sequence.Add(history, history.Host(0, 0, 128));
      const auto q = Random(seed).Normals(sequence.n_tokens * heads.n_heads * dim, 1.0f / std::sqrt(float(dim)));
      CheckDecode({sequence}, heads, q, 2, DecodeErrors(dim, 128), outcome);
    }
  }
}

// The sink, two tiers, a recent window that is not full and poisoned behind; queries of several tokens.
Sequence Mixed(const History& sink, const History& middle, const History& cold, const History& recent, int last,
               int n_tokens) {
  Sequence sequence = {.first_pos = last + 1 - n_tokens, .n_tokens = n_tokens};
  sequence.Add(sink, sink.Host(0, 0, 16));
  sequence.Add(middle, middle.Host(0, 16, 128));
  sequence.Add(cold, cold.Host(128, 128, 192));
  sequence.Add(recent, recent.Host(256, 256, last + 1));
  return sequence;
}

void DecodeSegmentsCase(Outcome& outcome) {
  const int dim = 64;
  const auto exact = LayoutOf(2, dim, 64, {{16, dim}}, {{16, dim}}, false);
  const History sink(LayoutOf(2, dim, 16, {{16, dim}}, {{16, dim}}, false), 1, 16, 1);
  const History middle(LayoutOf(2, dim, 64, {{4, 32}, {2, 32}}, {{3, dim}}, true), 2, 128, 2);
  const History cold(LayoutOf(2, dim, 64, {{4, 32}, {0, 32}}, {{1, dim}}, true), 1, 64, 3);
  const Heads heads = {6, 2, dim};
  std::vector<Sequence> sequences;
  std::vector<std::unique_ptr<History>> recents;
  int n_tokens_all = 0;
  for (const int last : {256, 272, 319, 320}) {
    recents.push_back(std::make_unique<History>(exact, 2, last - 256 + 1, 4));
    for (const int n_tokens : {1, 7}) {
      sequences.push_back(Mixed(sink, middle, cold, *recents.back(), last, n_tokens));
      n_tokens_all += n_tokens;
    }
  }
  const auto q = Random(5).Normals(n_tokens_all * heads.n_heads * dim, 0.125f);
  CheckDecode(sequences, heads, q, 5, DecodeErrors(dim, 192), outcome);
}

void DecodeWindowsCase(Outcome& outcome) {
  const int dim = 64;
  const Heads heads = {2, 1, dim};
  for (const int bits : {16, 4}) {
    const History history(LayoutOf(1, dim, 64, {{bits, dim}}, {{bits, dim}}, bits == 4), 2, 128, 9);
    std::vector<Sequence> sequences;
    for (const int begin : {0, 1, 16, 63, 64, 65, 128}) {
      for (const int end : {0, 1, 31, 64, 66, 127, 500}) {
        for (const int first : {999, 1062}) {  // some rows, or all, see nothing
          Sequence sequence = {.first_pos = first, .n_tokens = 3};
          sequence.Add(history, history.Host(1000, 1000 + begin, 1000 + end));
          sequence.host[0].min_age = sequence.device[0].min_age = end == 31 ? 1 : -1000;
          sequence.host[0].max_age = sequence.device[0].max_age = end == 66 ? 0 : 1000;
          sequences.push_back(sequence);
        }
      }
    }
    const auto q = Random(5).Normals(static_cast<std::int64_t>(sequences.size()) * 3 * 2 * dim, 0.125f);
    CheckDecode(sequences, heads, q, 3, DecodeErrors(dim, 128), outcome);
  }
}

void DecodeMassCase(Outcome& outcome) {
  const int dim = 64;
  const Heads heads = {8, 2, dim};
  const History history(LayoutOf(2, dim, 64, {{4, 32}, {16, 16}, {2, 16}}, {{3, dim}}, true), 2, 128, 17);
  std::vector<float> mass(2 * (1 + kMaxRuns));
  for (std::size_t i = 0; i < mass.size(); ++i) mass[i] = 0.1f * static_cast<float>(i % 5);
  const Buffer<float> device_mass(mass);
  Sequence sequence = {.first_pos = 127};
  sequence.Add(history, history.Host(0, 0, 128), &mass, &device_mass);
  CheckDecode({sequence}, heads, Random(8).Normals(8 * dim, 0.125f), 1, DecodeErrors(dim, 128), outcome);
}

// Scores of several hundred: one token takes all. A NaN stays in its row. More heads share a KV head than a tile has
// rows.
void DecodeExtremesCase(Outcome& outcome) {
  const int dim = 64;
  const auto exact = LayoutOf(1, dim, 64, {{16, dim}}, {{16, dim}}, false);
  const History large(exact, 4, 256, 21, 30.0f);
  Sequence sequence = {.first_pos = 255};
  sequence.Add(large, large.Host(0, 0, 256));
  auto q = Random(6).Normals(20 * dim);
  CheckDecode({sequence}, {20, 1, dim}, q, 3, {1e-2, 1e-3}, outcome);
  const History packed(LayoutOf(1, dim, 64, {{4, dim}}, {{4, dim}}, true), 1, 64, 22);
  Sequence with_nan = {.first_pos = 63};
  with_nan.Add(packed, packed.Host(0, 0, 64));
  for (float& x : q) x *= 0.125f;
  q[3 * dim + 1] = kNan;
  CheckDecode({with_nan}, {20, 1, dim}, q, 1, DecodeErrors(dim, 64), outcome);
}

// Uneven sequences over many thread blocks: every block of every tile in exactly one item, the load level.
void DecodePlanCase(Outcome& outcome) {
  const auto layout = LayoutOf(8, 128, 64, {{3, 128}}, {{3, 128}}, true);
  std::vector<KvSegment> segments;
  std::vector<AttentionSequence> sequences;
  const std::vector<int> lengths = {1, 64, 4096, 131072, 700};
  segments.reserve(lengths.size());
  for (const int length : lengths) segments.push_back({nullptr, (length + 63) / 64, &layout, 0, 0, length});
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    sequences.push_back({{&segments[i], 1}, lengths[i] - 1, 1, 0, static_cast<std::int64_t>(i)});
  }
  AttentionTiles plan;
  outcome.Expect(MakeDecodeTiles(sequences, 32, 8, 128, 264, &plan) == KernelStatus::kOk, "plan");
  outcome.Expect(plan.tiles.size() == 5 * 8 && plan.first_item.size() == 265, "a tile for each sequence and KV head");
  std::vector<int> blocks(plan.tiles.size(), 0), parts(static_cast<std::size_t>(plan.n_parts), 0);
  std::int64_t largest = 0, total = 0;
  for (std::size_t b = 0; b + 1 < plan.first_item.size(); ++b) {
    std::int64_t load = 0;
    for (int i = plan.first_item[b]; i < plan.first_item[b + 1]; ++i) {
      const DeviceItem& item = plan.items[static_cast<std::size_t>(i)];
      blocks[static_cast<std::size_t>(item.tile)] += item.block_end - item.block_begin;
      ++parts[static_cast<std::size_t>(item.part)];
      load += kItemBytes + std::int64_t{item.block_end - item.block_begin} * layout.head_bytes;
    }
    largest = std::max(largest, load);
    total += load;
  }
  for (std::size_t t = 0; t < blocks.size(); ++t) {
    outcome.Expect(blocks[t] == (lengths[t / 8] + 63) / 64, "each block of a tile once");
  }
  outcome.Expect(std::all_of(parts.begin(), parts.end(), [](int n) { return n == 1; }), "each part once");
  outcome.Expect(static_cast<double>(largest) < 1.25 * static_cast<double>(total) / 264, "load is level");
  outcome.Expect(MakeDecodeTiles(sequences, 30, 8, 128, 4, &plan) == KernelStatus::kBadShape,
                 "heads that do not divide");
}

// Exact blocks alone: q and the probabilities as sums of two bf16, so 17 bits of every factor.
void DecodeExactCase(Outcome& outcome) {
  const int dim = 80;
  const Heads heads = {8, 2, dim};
  const History history(LayoutOf(2, dim, 64, {{16, dim}}, {{16, dim}}, false), 2, 100, 23);
  Sequence sequence = {.first_pos = 99};
  sequence.Add(history, history.Host(0, 0, 100));
  CheckDecode({sequence}, heads, Random(10).Normals(8 * dim, 0.11f), 1, {0x1p-16, 0x1p-16}, outcome);
}

// ---- Prefill ----

// q and the probabilities are bf16: factors that err by up to half of 2^-8, independently; codes are exact. The
// rounding of the result comes on top.
constexpr Errors kPrefillErrors = {6 * 0.6 * kEpsBf16, kEpsBf16};

void CheckPrefill(const std::vector<Sequence>& sequences, const Heads& heads, const std::vector<float>& q,
                  const Errors& errors, Outcome& outcome) {
  const int d = heads.head_dim;
  std::int64_t n_tokens = 0;
  const std::vector<AttentionSequence> asked = Ask(sequences, heads, &n_tokens);
  AttentionTiles plan;
  outcome.Expect(MakePrefillTiles(asked, heads.n_heads, heads.n_kv_heads, d, &plan) == KernelStatus::kOk, "plan");
  const DeviceTiles device(plan);
  const std::int64_t dst_stride = heads.n_heads * d + 4;
  const Buffer<float> device_q(q);
  const Buffer<Bf16> dst(std::vector<Bf16>(static_cast<std::size_t>(n_tokens * dst_stride), FloatToBf16(-7.0f)));
  outcome.Done(PrefillAttention(
      {device_q.data(), device.tiles.data(), static_cast<std::int32_t>(plan.tiles.size()), device.segments.data(),
       plan.layouts.data(), static_cast<std::int32_t>(plan.layouts.size()), d, dst.data(), dst_stride},
      nullptr));
  const auto got = dst.ToHost();
  std::int64_t q_offset = 0;
  std::int64_t first_token = 0;
  for (const Sequence& sequence : sequences) {
    const Rows expected = ReferenceRows(sequence, heads, q.data() + q_offset);
    q_offset += std::int64_t{sequence.n_tokens} * heads.n_heads * d;
    std::vector<double> out;
    for (int head = 0; head < heads.n_kv_heads; ++head) {
      for (int row = 0; row < sequence.n_tokens * heads.group(); ++row) {
        const std::int64_t at =
            (first_token + row / heads.group()) * dst_stride + (head * heads.group() + row % heads.group()) * d;
        for (int i = 0; i < d; ++i) out.push_back(Bf16ToFloat(got[static_cast<std::size_t>(at + i)]));
      }
    }
    CheckRows(expected, out, {}, d, errors, kEpsBf16, outcome);
    first_token += sequence.n_tokens;
  }
}

void PrefillShapesCase(Outcome& outcome) {
  for (const int dim : {64, 80, 144}) {
    unsigned seed = 200;
    for (const Shape& shape : ShapesOf(dim)) {
      const int group = seed % 2 == 0 ? 4 : 3, n_tokens = dim == 64 && group == 3 ? 30 : 5;
      if (dim != 64 && seed % 3 != 0) {  // the larger ones with every third shape
        ++seed;
        continue;
      }
      const Heads heads = {group * 2, 2, dim};
      const auto layout = LayoutOf(2, dim, 64, shape.k, shape.v, seed % 3 != 0);
      const History history(layout, 2, 128, ++seed);
      Sequence sequence = {.first_pos = 128 - n_tokens, .n_tokens = n_tokens};
      sequence.Add(history, history.Host(0, 0, 128));
      const auto q = Random(seed).Normals(n_tokens * heads.n_heads * dim, 1.0f / std::sqrt(float(dim)));
      CheckPrefill({sequence}, heads, q, kPrefillErrors, outcome);
    }
  }
}

void PrefillSegmentsCase(Outcome& outcome) {
  const int dim = 64;
  const auto exact = LayoutOf(2, dim, 64, {{16, dim}}, {{16, dim}}, false);
  const History sink(LayoutOf(2, dim, 16, {{16, dim}}, {{16, dim}}, false), 1, 16, 1);
  const History middle(LayoutOf(2, dim, 64, {{4, 32}, {2, 32}}, {{3, dim}}, true), 2, 128, 2);
  const History cold(LayoutOf(2, dim, 64, {{4, 32}, {0, 32}}, {{1, 48}, {16, 16}}, true), 1, 64, 3);
  const Heads heads = {6, 2, dim};
  std::vector<Sequence> sequences;
  std::vector<std::unique_ptr<History>> recents;
  int n_tokens_all = 0;
  for (const int last : {272, 319, 383}) {
    recents.push_back(std::make_unique<History>(exact, 2, last - 256 + 1, 4));
    for (const int n_tokens : {1, 16, 60}) {
      sequences.push_back(Mixed(sink, middle, cold, *recents.back(), last, n_tokens));
      n_tokens_all += n_tokens;
    }
  }
  const auto q = Random(5).Normals(n_tokens_all * heads.n_heads * dim, 0.125f);
  CheckPrefill(sequences, heads, q, kPrefillErrors, outcome);
}

// Windows and ages at every edge, the mass correction, and a NaN that stays in its row.
void PrefillWindowsCase(Outcome& outcome) {
  const int dim = 64;
  const Heads heads = {2, 1, dim};
  const History history(LayoutOf(1, dim, 64, {{4, dim}}, {{4, dim}}, true), 2, 128, 9);
  const std::vector<float> mass = {0.3f, 0.2f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  const Buffer<float> device_mass(mass);
  std::vector<Sequence> sequences;
  for (const int begin : {0, 1, 63, 64, 65, 128}) {
    for (const int end : {0, 1, 64, 66, 127}) {
      Sequence sequence = {.first_pos = 1060, .n_tokens = 10};
      sequence.Add(history, history.Host(1000, 1000 + begin, 1000 + end), &mass, &device_mass);
      sequence.host[0].max_age = sequence.device[0].max_age = end == 66 ? 0 : 1000;
      sequences.push_back(sequence);
    }
  }
  auto q = Random(5).Normals(static_cast<std::int64_t>(sequences.size()) * 10 * 2 * dim, 0.125f);
  q[2 * dim + 5] = kNan;
  CheckPrefill(sequences, heads, q, kPrefillErrors, outcome);
}

constexpr Case kPrefill[] = {
    {"prefill", "shapes", PrefillShapesCase},
    {"prefill", "segments", PrefillSegmentsCase},
    {"prefill", "windows", PrefillWindowsCase},
};

constexpr Case kDecode[] = {
    {"decode", "exact", DecodeExactCase},       {"decode", "shapes", DecodeShapesCase},
    {"decode", "segments", DecodeSegmentsCase}, {"decode", "windows", DecodeWindowsCase},
    {"decode", "mass", DecodeMassCase},         {"decode", "extremes", DecodeExtremesCase},
    {"decode", "plan", DecodePlanCase},
};

}  // namespace

std::span<const Case> DecodeCases() { return kDecode; }
std::span<const Case> PrefillCases() { return kPrefill; }

}  // namespace zeroc::kernels::cuda
