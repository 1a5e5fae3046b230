#include <algorithm>

#include "kernels/cuda/cases/cases.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/reference/reference.h"

namespace zeroc::kernels::cuda {
namespace {

constexpr KvScaleKind kShared = KvScaleKind::kShared;

double Norm(const float* x, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  return std::sqrt(sum);
}

// Bound of one mapped coordinate: d products of |rope(x)| <= |x| and a column of the map in f32, doubled for the
// reference; with a map each factor is off by half a unit of its second bf16 and low * low is left out (2^-18 each).
double MapBound(const float* x, const float* map, int dim, int column, double scale) {
  if (map == nullptr) return 4 * kEps32 * scale * Norm(x, dim);
  double column_norm = 0.0;
  for (int i = 0; i < dim; ++i) column_norm += std::pow(map[i * dim + column], 2);
  return (2 * (dim + 4) * kEps32 + 3 * 0x1p-18) * scale * Norm(x, dim) * std::sqrt(column_norm);
}

struct SplitMapBuffer {
  explicit SplitMapBuffer(const std::vector<float>& maps, int heads, int dim)
      : tiles(static_cast<std::size_t>(SplitMapBytes(heads, dim))) {
    const Buffer<float> device(maps);
    status = SplitMaps(device.data(), heads, dim, tiles.data(), nullptr);
    Synchronize(nullptr);
  }
  Buffer<std::uint8_t> tiles;
  KernelStatus status;
};

// Two sequences in one call, of which the first fills more than a tile in one of the shapes.
void QueryPrepCase(Outcome& outcome) {
  for (const int dim : {16, 80, 128, 144}) {
    const int group = dim == 128 ? 3 : 5, n_kv_heads = 2, n_heads = group * n_kv_heads;
    const int lengths[] = {dim == 80 ? 14 : 2, 1}, positions[] = {40, 7}, n_tokens = lengths[0] + lengths[1];
    Random random(static_cast<unsigned>(dim));
    const std::int64_t stride = n_heads * dim + 1;
    const auto q = random.Normals(n_tokens * stride);
    const auto map = random.Normals(n_kv_heads * dim * dim);
    const RopeTables rope(64, dim, 0);
    const Buffer<float> device_q(q), cos(rope.cos), sin(rope.sin);
    const SplitMapBuffer map_tiles(map, n_kv_heads, dim);
    std::vector<QueryPrepTile> tiles;
    for (int s = 0, token = 0; s < 2; token += lengths[s++]) {
      for (int row = 0; row < lengths[s] * group; row += kQueryTileRows) {
        tiles.push_back({token, std::int64_t{token} * n_heads * dim, positions[s], lengths[s], row});
      }
    }
    const Buffer<QueryPrepTile> device_tiles(tiles);
    for (const bool with_map : {false, true}) {
      for (const bool with_rope : {false, true}) {
        std::vector<float> expected(static_cast<std::size_t>(n_tokens * n_heads * dim), -1.0f);
        const Buffer<float> out(expected);
        for (int s = 0, token = 0; s < 2; token += lengths[s++]) {
          QueryPrepArgs args = {q.data() + token * stride,
                                stride,
                                lengths[s],
                                n_heads,
                                n_kv_heads,
                                dim,
                                0,
                                n_kv_heads,
                                {},
                                with_map ? map.data() : nullptr,
                                0.125f,
                                expected.data() + token * n_heads * dim};
          const int at = positions[s] * dim / 2;
          if (with_rope) args.rope = {rope.cos.data() + at, rope.sin.data() + at};
          ReferenceOps().query_prep(args);
        }
        QueryPrepBatchArgs args = {device_q.data(),
                                   stride,
                                   n_heads,
                                   n_kv_heads,
                                   dim,
                                   device_tiles.data(),
                                   static_cast<std::int32_t>(tiles.size()),
                                   {},
                                   with_map ? map_tiles.tiles.data() : nullptr,
                                   0.125f,
                                   out.data()};
        if (with_rope) args.rope = {cos.data(), sin.data()};
        outcome.Done(QueryPrepBatch(args, nullptr));
        const auto got = out.ToHost();
        std::size_t at = 0;
        for (int s = 0, token = 0; s < 2; token += lengths[s++]) {
          for (int head = 0; head < n_kv_heads; ++head) {
            for (int row = 0; row < lengths[s] * group; ++row) {
              const float* x = q.data() + (token + row / group) * stride + (head * group + row % group) * dim;
              const float* map_of_head = with_map ? map.data() + head * dim * dim : nullptr;
              for (int i = 0; i < dim; ++i, ++at) {
                outcome.Check(got[at], expected[at], MapBound(x, map_of_head, dim, i, 0.125));
              }
            }
          }
        }
      }
    }
  }
}

// Models without RoPE: the rotation inside the runs is all that is left for the op.
void RotationCase(Outcome& outcome) {
  const int dim = 64, heads = 2, n = 9;
  for (const auto& runs : {std::vector<KvRun>{{8, 64}}, {{4, 48}, {0, 16}}, {{8, 16}, {2, 32}, {16, 16}}}) {
    const KvSideLayout side = LayoutOf(heads, dim, 64, runs, {{8, dim}}, true).k;
    Random random(9);
    const auto q = random.Normals(n * heads * dim);
    std::vector<float> expected(q.size());
    QueryPrepArgs args = {q.data(), heads * dim, n, heads, heads, dim, 0, heads, {}, nullptr, 0.125f, expected.data()};
    args.rotation = &side;
    ReferenceOps().query_prep(args);
    const Buffer<float> device(q), out(q.size());
    const Buffer<QueryPrepTile> tile(std::vector<QueryPrepTile>{{0, 0, 5, n, 0}});
    outcome.Done(QueryPrepBatch(
        {device.data(), heads * dim, heads, heads, dim, tile.data(), 1, {}, nullptr, 0.125f, out.data(), &side},
        nullptr));
    outcome.Expect(out.ToHost() == expected, "the rotation has the reference's order of operations");
  }
}

// A sequence's blocks on the device, each at a multiple of 16 bytes.
class Blocks {
 public:
  Blocks(int n, int block_bytes, std::uint8_t fill)
      : n_(n), bytes_(block_bytes), data_(std::vector<std::uint8_t>(Size(), fill)), pointers_(Pointers()) {}
  std::uint8_t* const* pointers() const { return pointers_.data(); }
  std::uint8_t* block(int i) const { return data_.data() + std::ptrdiff_t{i} * bytes_; }
  const std::uint8_t* const* const_pointers() const { return pointers_.data(); }
  std::vector<std::uint8_t> Host(int block) const {
    const auto all = data_.ToHost();
    const auto begin = all.begin() + std::ptrdiff_t{block} * bytes_;
    return {begin, begin + bytes_};
  }
  void Set(int block, const std::vector<std::uint8_t>& from) {
    CopyToDevice(data_.data() + std::ptrdiff_t{block} * bytes_, from.data(), from.size(), nullptr);
    Synchronize(nullptr);
  }

 private:
  std::size_t Size() const { return static_cast<std::size_t>(n_) * static_cast<std::size_t>(bytes_); }
  std::vector<std::uint8_t*> Pointers() const {
    std::vector<std::uint8_t*> out;
    out.reserve(static_cast<std::size_t>(n_));
    for (int b = 0; b < n_; ++b) out.push_back(data_.data() + std::ptrdiff_t{b} * bytes_);
    return out;
  }
  int n_, bytes_;
  Buffer<std::uint8_t> data_;
  Buffer<std::uint8_t*> pointers_;
};

struct WriteShape {
  int dim, first, n;
  bool packs;
};

// One call of KvWriteBatch: the exact rows to their bound, the others untouched, packed bytes those of the reference
// from the exact block that this call left. The last of several blocks is not packed.
void CheckWrite(const WriteShape& shape, Outcome& outcome) {
  const int heads = 2, dim = shape.dim, first = shape.first, n = shape.n;
  const auto exact = LayoutOf(heads, dim, 64, {{16, dim}}, {{16, dim}}, false);
  const auto packed = LayoutOf(heads, dim, 64, {{4, 16}, {3, dim - 32, kShared}, {1, 16}}, {{3, dim}}, true);
  Random random(static_cast<unsigned>(dim + first));
  const int n_blocks = (first + n - 1) / 64 - first / 64 + 1;
  const std::int64_t stride = heads * dim + 3;
  const auto k = random.Normals(n * stride), v = random.Normals(n * stride);
  const auto map = random.Normals(heads * dim * dim, 0.2f);
  const RopeTables rope(first + n, dim, 0);
  const Buffer<float> device_k(k), device_v(v), cos(rope.cos), sin(rope.sin);
  const SplitMapBuffer tiles(map, heads, dim);
  // Rows that are there already: small numbers, 0x3dcd is 0.1.
  Blocks device_blocks(n_blocks, exact.block_bytes, 0x3d), device_packed(n_blocks, packed.block_bytes, 0x5a);
  std::vector<std::vector<std::uint8_t>> expected(
      static_cast<std::size_t>(n_blocks), std::vector<std::uint8_t>(static_cast<std::size_t>(exact.block_bytes), 0x3d));
  std::vector<std::uint8_t*> expected_blocks;
  expected_blocks.reserve(expected.size());
  for (auto& block : expected) expected_blocks.push_back(block.data());
  KvWriteArgs write = {k.data(),
                       v.data(),
                       stride,
                       first,
                       n,
                       0,
                       heads,
                       {rope.cos.data() + first * dim / 2, rope.sin.data() + first * dim / 2},
                       map.data(),
                       &exact,
                       expected_blocks.data()};
  outcome.Expect(ReferenceOps().kv_write(write) == KernelStatus::kOk, "reference");
  const auto is_packed = [&](int b) { return shape.packs && (n_blocks == 1 || b + 1 < n_blocks); };
  std::vector<KvWriteBlock> places;
  for (int b = 0; b < n_blocks; ++b) {
    const int begin = std::max(first, (first / 64 + b) * 64), end = std::min(first + n, (first / 64 + b + 1) * 64);
    places.push_back(
        {device_blocks.block(b), is_packed(b) ? device_packed.block(b) : nullptr, begin - first, begin, end - begin});
  }
  const Buffer<KvWriteBlock> device_places(places);
  outcome.Done(KvWriteBatch({device_k.data(),
                             device_v.data(),
                             stride,
                             device_places.data(),
                             n_blocks,
                             {cos.data(), sin.data()},
                             tiles.tiles.data(),
                             &exact,
                             shape.packs ? &packed : nullptr},
                            nullptr));
  for (int b = 0; b < n_blocks; ++b) {
    const auto got = device_blocks.Host(b);
    for (int row = 0; row < 64; ++row) {
      const int t = (first / 64 + b) * 64 + row - first;
      for (int g = 0; g < heads; ++g) {
        std::vector<float> want(static_cast<std::size_t>(dim)), have(want.size());
        reference::DecodeKeyRow(exact, expected_blocks[static_cast<std::size_t>(b)] + g * exact.head_bytes, row,
                                want.data());
        reference::DecodeKeyRow(exact, got.data() + g * exact.head_bytes, row, have.data());
        for (int i = 0; i < dim; ++i) {
          const double value = want[static_cast<std::size_t>(i)];
          double bound = 0;
          if (t >= 0 && t < n) {
            bound = MapBound(k.data() + t * stride + g * dim, map.data() + g * dim * dim, dim, i, 1.0);
            bound += 2 * kEpsBf16 * std::abs(value);  // may round apart
          }
          outcome.Check(have[static_cast<std::size_t>(i)], value, bound);
        }
        reference::DecodeValueRow(exact, expected_blocks[static_cast<std::size_t>(b)] + g * exact.head_bytes, row,
                                  want.data());
        reference::DecodeValueRow(exact, got.data() + g * exact.head_bytes, row, have.data());
        outcome.Expect(have == want, "values are only rounded");
      }
    }
    std::vector<std::uint8_t> reference_packed(static_cast<std::size_t>(packed.block_bytes), 0x5a);
    if (is_packed(b)) ReferenceOps().kv_pack({got.data(), &exact, reference_packed.data(), &packed, 0, heads});
    outcome.Expect(device_packed.Host(b) == reference_packed, "packed bytes");
  }
}

void KvWriteCase(Outcome& outcome) {
  for (const WriteShape& shape : {WriteShape{64, 63, 2, false}, {80, 130, 17, false}, {64, 0, 1, false}}) {
    CheckWrite(shape, outcome);
  }
}
void KvWritePackCase(Outcome& outcome) {
  for (const WriteShape& shape : {WriteShape{64, 64, 128, true}, {128, 5, 59, true}}) CheckWrite(shape, outcome);
}

// Keys with a mean and values with outliers, one token all zero; token sizes span six octaves.
std::vector<std::uint8_t> ExactBlock(const KvBlockLayout& exact, unsigned seed) {
  Random random(seed);
  const int n = exact.n_kv_heads * exact.head_dim;
  auto k = random.Normals(64 * n), v = random.Normals(64 * n, 0.01f);
  for (std::size_t i = 0; i < v.size(); ++i) {
    const std::size_t token = i / static_cast<std::size_t>(n);
    if (i % 37 == 0) v[i] *= 20.0f;
    if (i % 5 == 0) k[i] += 3.0f;
    k[i] *= std::exp2(static_cast<float>(token % 7) - 3.0f);
    if (token == 9) k[i] = v[i] = 0.0f;
  }
  std::vector<std::uint8_t> block(static_cast<std::size_t>(exact.block_bytes), 0);
  std::uint8_t* blocks[] = {block.data()};
  ReferenceOps().kv_write({k.data(), v.data(), n, 0, 64, 0, exact.n_kv_heads, {}, nullptr, &exact, blocks});
  return block;
}

void ExpectSamePack(const KvBlockLayout& from, const KvBlockLayout& to, const std::vector<std::uint8_t>& source,
                    std::vector<std::uint8_t>* packed, Outcome& outcome) {
  const int heads = from.n_kv_heads;
  packed->assign(static_cast<std::size_t>(to.block_bytes), 0x5a);
  ReferenceOps().kv_pack({source.data(), &from, packed->data(), &to, 0, heads});
  Blocks sources(2, from.block_bytes, 0), targets(2, to.block_bytes, 0x5a);
  for (int b = 0; b < 2; ++b) sources.Set(b, source);
  outcome.Done(KvPackBatch({sources.const_pointers(), targets.pointers(), 2, &from, &to, 0, heads}, nullptr));
  for (int b = 0; b < 2; ++b) outcome.Expect(targets.Host(b) == *packed, "packed bytes");
}

void KvPackCase(Outcome& outcome) {
  const int heads = 3, dim = 64;
  const auto exact = LayoutOf(heads, dim, 64, {{16, dim}}, {{16, dim}}, false);
  const auto source = ExactBlock(exact, 11);
  std::vector<std::uint8_t> packed;
  for (const auto& runs :
       std::vector<std::vector<KvRun>>{{{8, 64}},
                                       {{4, 64}},
                                       {{3, 64}},
                                       {{2, 64}},
                                       {{1, 64}},
                                       {{16, 64}},
                                       {{4, 16}, {3, 16}, {2, 32}},
                                       {{8, 16}, {0, 16}, {1, 32}},
                                       {{16, 32}, {4, 32}},
                                       {{8, 64, kShared}},
                                       {{4, 64, kShared}},
                                       {{3, 64, kShared}},
                                       {{2, 64, kShared}},
                                       {{1, 64, kShared}},
                                       {{4, 16, kShared}, {2, 16, kShared}, {1, 16, kShared}, {0, 16}},
                                       {{3, 48, kShared}, {4, 16}}}) {
    for (const int n_tokens : {16, 64}) {
      const auto to = LayoutOf(heads, dim, n_tokens, runs, runs, n_tokens == 64);
      ExpectSamePack(exact, to, source, &packed, outcome);
    }
  }
}

// From one packed layout to the next, as blocks age: dropped runs, rotations and copies included.
void KvRepackCase(Outcome& outcome) {
  const int heads = 2, dim = 80;
  const auto exact = LayoutOf(heads, dim, 64, {{16, dim}}, {{16, dim}}, false);
  const auto young = LayoutOf(heads, dim, 64, {{8, 32}, {4, 48}}, {{4, 80}}, true);
  const auto old =
      LayoutOf(heads, dim, 64, {{4, 16, kShared}, {2, 48, kShared}, {0, 16}}, {{3, 48}, {1, 32, kShared}}, true);
  std::vector<std::uint8_t> first, second, third;
  ExpectSamePack(exact, young, ExactBlock(exact, 12), &first, outcome);
  ExpectSamePack(young, old, first, &second, outcome);
  ExpectSamePack(old, old, second, &third, outcome);
}

void BadKvCase(Outcome& outcome) {
  const auto exact = LayoutOf(1, 64, 64, {{16, 64}}, {{16, 64}}, false);
  const auto wide = LayoutOf(1, 64, 64, {{32, 64}}, {{32, 64}}, false);
  const auto other = LayoutOf(1, 80, 64, {{16, 80}}, {{16, 80}}, false);
  const Blocks blocks(1, wide.block_bytes, 0);
  const Buffer<float> x(64 * 64);
  const auto is = [&](KernelStatus status, KernelStatus expected) {
    outcome.Expect(status == expected, "bad shape taken");
  };
  KvPackBatchArgs pack = {blocks.const_pointers(), blocks.pointers(), 1, &exact, &other, 0, 1};
  is(KvPackBatch(pack, nullptr), KernelStatus::kBadShape);
  pack.packed_layout = &wide;
  is(KvPackBatch(pack, nullptr), KernelStatus::kUnsupported);
  const Buffer<KvWriteBlock> place(std::vector<KvWriteBlock>{{blocks.block(0), nullptr, 0, 0, 1}});
  KvWriteBatchArgs write = {x.data(), x.data(), 64, place.data(), 1, {}, nullptr, &wide};
  is(KvWriteBatch(write, nullptr), KernelStatus::kUnsupported);
  write.layout = &exact;
  write.packed_layout = &other;
  is(KvWriteBatch(write, nullptr), KernelStatus::kBadShape);
  QueryPrepBatchArgs prep = {x.data(), 64, 3, 2, 16, nullptr, 0, {}, nullptr, 1.0f, x.data()};
  is(QueryPrepBatch(prep, nullptr), KernelStatus::kBadShape);  // heads that do not divide
  is(SplitMaps(x.data(), 1, 40, nullptr, nullptr), KernelStatus::kBadShape);
}

constexpr Case kCases[] = {
    {"kv", "query_prep", QueryPrepCase}, {"kv", "rotation", RotationCase},
    {"kv", "kv_write", KvWriteCase},     {"kv", "kv_write and pack", KvWritePackCase},
    {"kv", "kv_pack", KvPackCase},       {"kv", "kv_pack of packed", KvRepackCase},
    {"kv", "bad shapes", BadKvCase},
};

}  // namespace

std::span<const Case> KvCases() { return kCases; }

}  // namespace zeroc::kernels::cuda
