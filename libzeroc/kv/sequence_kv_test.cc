#include "libzeroc/kv/sequence_kv.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <random>

#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/compression/profile.h"
#include "libzeroc/kv/kv_snapshot.h"
#include "libzeroc/kv/owned_pool.h"

namespace zeroc {
namespace {

constexpr int kLayers = 2;
constexpr int kHeadDim = 32;

class PoolFixture {
 public:
  explicit PoolFixture(std::size_t bytes)
      : data_(static_cast<std::byte*>(std::aligned_alloc(64, bytes))),
        pool_(BlockPool::Create({data_, bytes}, 64 << 10).value()) {}
  ~PoolFixture() {
    pool_.reset();
    std::free(data_);
  }
  PoolFixture(const PoolFixture&) = delete;
  PoolFixture& operator=(const PoolFixture&) = delete;
  BlockPool& pool() { return *pool_; }

 private:
  std::byte* data_;
  std::unique_ptr<BlockPool> pool_;
};

// young: blocks of each younger tier, at 8 bits.
std::shared_ptr<const KvFormat> Format(int bits, int recent_tokens, int sink_tokens,
                                       const std::vector<int>& young = {}) {
  const ModelGeometry geometry{kLayers, 2, 1, kHeadDim, 64};
  Profile profile = UniformProfile("test", bits, kLayers, kHeadDim);
  profile.recent_tokens = recent_tokens;
  profile.sink_tokens = sink_tokens;
  for (const int n_blocks : young) {
    profile.young.push_back({n_blocks, UniformProfile("8", 8, kLayers, kHeadDim).layers});
  }
  return KvFormat::FromProfile(geometry, profile, /*exact_bits=*/16).value();
}

// Stands in for the forward pass: every token writes its position into its slot of the block's raw bytes, "packing"
// copies the 64 slots. The real kernels have tests of their own.
void RunStep(SequenceKv& kv, int n_new) {
  kv.BeginStep(n_new);
  for (int layer = 0; layer < kLayers; ++layer) {
    const int first_block = kv.n_tokens() / 64;
    for (int pos = kv.n_tokens(); pos < kv.n_tokens() + n_new; ++pos) {
      const std::int32_t tag = pos * 10 + layer;
      std::memcpy(kv.WriteBlocks(layer)[pos / 64 - first_block] + 4 * (pos % 64), &tag, 4);
    }
    for (int tier = 0; tier < static_cast<int>(kv.format().tiers.size()); ++tier) {
      for (int b = kv.pack_begin(tier); b < kv.pack_end(tier); ++b) {
        std::memcpy(kv.PackedBlock(layer, tier, b), kv.PackSource(layer, tier, b), 256);
      }
    }
  }
}

// Every position 0 .. t is visible exactly once, in the segment kind that the rule demands, with its own tag.
void CheckSeen(const SequenceKv& kv, int layer, int t) {
  kernels::KvSegment segments[KvFormat::kMaxSegments];
  const int n = kv.Segments(layer, t, t, segments);
  const KvFormat& format = kv.format();
  const int n_packed = format.PackedBlocksAt(t);
  // The layout that a token's block has by its age alone.
  const auto expected = [&](int pos) {
    const int age = t - (pos / 64 * 64 + 63);
    int limit = format.recent_tokens;
    if (!format.packs || age <= limit) return &format.exact;
    std::size_t tier = 0;
    while (format.tiers[tier].n_blocks > 0 && age > (limit += 64 * format.tiers[tier].n_blocks)) ++tier;
    return &format.tiers[tier].layouts[static_cast<std::size_t>(layer)];
  };
  int pos = 0;
  for (int s = 0; s < n; ++s) {
    const kernels::KvSegment& segment = segments[s];
    ASSERT_EQ(segment.begin_pos, pos);
    for (; pos < segment.end_pos; ++pos) {
      const int block = (pos - segment.first_pos) / segment.layout->n_tokens;
      ASSERT_LT(block, segment.n_blocks);
      const bool sink = segment.layout->n_tokens == kernels::kSinkTokens;
      EXPECT_EQ(sink, n_packed > 0 && pos < format.sink_tokens);
      if (sink) continue;
      EXPECT_EQ(segment.layout, expected(pos)) << "t " << t << " pos " << pos;
      std::int32_t tag;
      std::memcpy(&tag, segment.blocks[block] + 4 * (pos % 64), 4);
      ASSERT_EQ(tag, pos * 10 + layer) << "t " << t;
    }
  }
  ASSERT_EQ(pos, t + 1);
}

TEST(SequenceKvTest, QueriesSeeEveryTokenOnceWhateverTheChunks) {
  for (const int recent : {0, 1, 63, 64, 100, 128, 200}) {
    for (const int sink : {0, 16}) {
      for (unsigned seed = 0; seed < 6; ++seed) {
        PoolFixture fixture(4 << 20);
        std::mt19937 rng(seed);
        const int step_max = seed == 0 ? 1 : 1 + static_cast<int>(rng() % 300);
        const int total = 900;
        const std::vector<int> young[] = {{}, {1}, {4}, {1, 3}, {1, 2, 1}, {20}};
        auto kv = SequenceKv::Create(fixture.pool(), Format(2, recent, sink, young[seed]), total, step_max).value();
        while (kv->n_tokens() < total) {
          const int n = std::min(total - kv->n_tokens(), 1 + static_cast<int>(rng() % static_cast<unsigned>(step_max)));
          const int begin = kv->n_tokens();
          RunStep(*kv, n);
          for (int t = begin; t < begin + n; t += 1 + static_cast<int>(rng() % 20)) {
            for (int layer = 0; layer < kLayers; ++layer) ASSERT_NO_FATAL_FAILURE(CheckSeen(*kv, layer, t));
          }
          kv->EndStep();
        }
        EXPECT_EQ(fixture.pool().usage().bytes_used, SequenceKv::BytesNeeded(kv->format(), total, step_max));
        kv.reset();
        EXPECT_EQ(fixture.pool().usage().n_blocks_used, 0u);
      }
    }
  }
}

// Room grows while the sequence does, steps get longer and shorter, and its bytes leave for a snapshot and come back.
TEST(SequenceKvTest, ResizedAndRestoredSequencesKeepEveryToken) {
  const std::vector<int> young[] = {{}, {1}, {4}, {1, 3}, {1, 2, 1}, {20}};
  for (const int recent : {0, 1, 63, 100, 200}) {
    for (unsigned seed = 0; seed < 12; ++seed) {
      PoolFixture fixture(4 << 20);
      std::mt19937 rng(seed);
      const auto format = seed == 11 ? Format(16, recent, 16) : Format(2, recent, 16, young[seed % 6]);
      int step_max = 1;
      auto kv = SequenceKv::Create(fixture.pool(), format, 1, step_max).value();
      while (kv->n_tokens() < 900) {
        if (rng() % 3 == 0 || kv->n_tokens() == kv->max_tokens()) {
          step_max = 1 + static_cast<int>(rng() % 200);
          ASSERT_TRUE(kv->Resize(kv->max_tokens() + static_cast<int>(1 + rng() % 130), step_max).ok());
          EXPECT_EQ(fixture.pool().usage().bytes_used, SequenceKv::BytesNeeded(*format, kv->max_tokens(), step_max));
        }
        if (kv->n_tokens() > 0 && rng() % 8 == 0) {
          const auto snapshot = KvSnapshot::Take(*kv);
          ASSERT_TRUE(snapshot.ok());
          EXPECT_EQ(snapshot->bytes(), kv->HeldBytes());
          const int room = kv->max_tokens();
          kv.reset();
          EXPECT_EQ(fixture.pool().usage().n_blocks_used, 0u);
          kv = SequenceKv::Create(fixture.pool(), format, room, step_max).value();
          ASSERT_TRUE(snapshot->Restore(*kv).ok());
        }
        const int most = std::min(kv->max_tokens() - kv->n_tokens(), step_max);
        if (most == 0) continue;
        const int n = 1 + static_cast<int>(rng() % static_cast<unsigned>(most));
        const int begin = kv->n_tokens();
        RunStep(*kv, n);
        for (int t = begin; t < begin + n; t += 1 + static_cast<int>(rng() % 20)) {
          for (int layer = 0; layer < kLayers; ++layer) ASSERT_NO_FATAL_FAILURE(CheckSeen(*kv, layer, t));
        }
        kv->EndStep();
      }
      kv.reset();
      EXPECT_EQ(fixture.pool().usage().n_blocks_used, 0u);
    }
  }
}

// The wire writes where the lease says, whatever room the output gets meanwhile; and a refusal changes nothing.
TEST(SequenceKvTest, ResizeKeepsTheBlocksOfThePrompt) {
  for (const int n_prompt : {1, 64, 65, 300, 700}) {
    PoolFixture fixture(1 << 20);
    const auto format = Format(3, 100, 16, {1, 2});
    auto kv = SequenceKv::Create(fixture.pool(), format, n_prompt + 1, 1).value();
    std::vector<LayerBlocks> before;
    for (int layer = 0; layer < kLayers; ++layer) before.push_back(kv->BlocksAt(layer, n_prompt));
    const auto used = [&] { return fixture.pool().usage().bytes_used; };
    const auto same = [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        const LayerBlocks now = kv->BlocksAt(layer, n_prompt), &old = before[static_cast<std::size_t>(layer)];
        EXPECT_EQ(now.exact, old.exact);
        EXPECT_EQ(now.sink, old.sink);
        for (std::size_t t = 0; t < old.packed.size(); ++t) EXPECT_EQ(now.packed[t].refs, old.packed[t].refs);
      }
    };
    for (const int room : {n_prompt + 2, n_prompt + 64, n_prompt + 500}) {
      ASSERT_TRUE(kv->Resize(room, 1).ok());
      same();
    }
    const std::uint64_t held = used();
    EXPECT_EQ(kv->Resize(1'000'000, 1).code(), StatusCode::kResourceExhausted);
    EXPECT_EQ(used(), held);
    EXPECT_EQ(kv->max_tokens(), n_prompt + 500);
    same();
  }
}

TEST(SequenceKvTest, ExactBytesStayBoundedByTheWindow) {
  PoolFixture fixture(64 << 20);
  const auto format = Format(2, 128, 16);
  auto kv = SequenceKv::Create(fixture.pool(), format, 8192, 512).value();
  auto unpacked = SequenceKv::BytesNeeded(*Format(16, 128, 16), 8192, 512);
  const std::uint64_t packed_bytes = static_cast<std::uint64_t>(format->PackedBlocksAt(8192)) * kLayers *
                                     static_cast<std::uint64_t>(format->tiers[0].layouts[0].block_bytes);
  const std::uint64_t exact_bytes = SequenceKv::BytesNeeded(*format, 8192, 512) - packed_bytes;
  EXPECT_LE(exact_bytes, (128 + 64 + 512 + 64 + 16) * std::uint64_t{kHeadDim} * 2 * 2 * kLayers);
  EXPECT_LT(packed_bytes, unpacked / 6);
}

// The receiver's blocks, filled as the wire would, continue the sequence exactly as the sender's own would.
TEST(SequenceKvTest, AdoptedPromptContinues) {
  for (const int n_prompt : {1, 16, 63, 64, 65, 191, 192, 193, 256, 700}) {
    PoolFixture sender_pool(4 << 20), receiver_pool(4 << 20);
    const auto format = n_prompt % 3 == 0 ? Format(3, 128, 16) : Format(3, 0, 16, {1, 2});
    auto sender = SequenceKv::Create(sender_pool.pool(), format, n_prompt, 128).value();
    while (sender->n_tokens() < n_prompt) {
      RunStep(*sender, std::min(128, n_prompt - sender->n_tokens()));
      if (sender->pack_begin(0) == 0 && sender->pack_end(0) > 0) {
        for (int layer = 0; layer < kLayers; ++layer) sender->CopySink(layer);
      }
      sender->EndStep();
    }
    auto receiver = SequenceKv::Create(receiver_pool.pool(), format, n_prompt + 300, 1).value();
    std::uint64_t sent = 0;
    for (int layer = 0; layer < kLayers; ++layer) {
      const LayerBlocks from = sender->BlocksAt(layer, n_prompt), to = receiver->BlocksAt(layer, n_prompt);
      const auto copy = [&](BlockRef a, BlockRef b, std::size_t bytes) {
        std::memcpy(receiver_pool.pool().Data(b), sender_pool.pool().Data(a), bytes);
        sent += bytes;
      };
      ASSERT_EQ(from.packed.size(), to.packed.size());
      ASSERT_EQ(from.exact.size(), to.exact.size());
      ASSERT_EQ(from.sink.valid(), to.sink.valid());
      for (std::size_t tier = 0; tier < from.packed.size(); ++tier) {
        ASSERT_EQ(from.packed[tier].refs.size(), to.packed[tier].refs.size());
        for (std::size_t i = 0; i < from.packed[tier].refs.size(); ++i) {
          copy(from.packed[tier].refs[i], to.packed[tier].refs[i], from.packed[tier].block_bytes);
        }
      }
      for (std::size_t i = 0; i < from.exact.size(); ++i) {
        copy(from.exact[i], to.exact[i], static_cast<std::size_t>(format->exact.block_bytes));
      }
      if (from.sink.valid()) copy(from.sink, to.sink, static_cast<std::size_t>(format->sink.block_bytes));
    }
    EXPECT_EQ(sent, sender->HeldBytes());
    receiver->AdoptPrompt(n_prompt);
    EXPECT_EQ(receiver->HeldBytes(), sent);
    for (int i = 0; i < 300; ++i) {
      RunStep(*receiver, 1);
      for (int layer = 0; layer < kLayers; ++layer) ASSERT_NO_FATAL_FAILURE(CheckSeen(*receiver, layer, n_prompt + i));
      receiver->EndStep();
    }
  }
}

TEST(SequenceKvTest, SinkCopyKeepsTheFirstTokens) {
  PoolFixture fixture(1 << 20);
  const auto format = Format(4, 0, 16);
  auto kv = SequenceKv::Create(fixture.pool(), format, 128, 128).value();
  kv->BeginStep(128);
  std::uint8_t* exact = const_cast<std::uint8_t*>(kv->PackSource(0, 0, 0));
  for (int i = 0; i < format->exact.block_bytes; ++i) exact[i] = static_cast<std::uint8_t>(i * 7 + i / 256);
  kv->CopySink(0);
  kernels::KvSegment segments[KvFormat::kMaxSegments];
  ASSERT_EQ(kv->Segments(0, 127, 127, segments), 3);
  const auto value = [](const std::uint8_t* block, const kernels::KvSideLayout& side, std::size_t tile, int lane,
                        int depth) {
    std::uint16_t bits;
    std::memcpy(&bits, block + side.codes_offset[0] + tile * 512 + 2 * (32 * (depth / 2) + 2 * lane + depth % 2), 2);
    return bits;
  };
  for (int token = 0; token < 16; ++token) {
    for (int coord = 0; coord < kHeadDim; ++coord) {
      const auto coord_tile = static_cast<std::size_t>(coord / 16);
      const std::uint8_t* sink = segments[0].blocks[0];
      // K: tile [token group][coordinate tile]; both have the first token group first.
      EXPECT_EQ(value(sink, format->sink.k, coord_tile, token, coord % 16),
                value(exact, format->exact.k, coord_tile, token, coord % 16));
      // V: tile [coordinate tile][token group], one token group in the sink, four in the exact block.
      EXPECT_EQ(value(sink, format->sink.v, coord_tile, coord % 16, token),
                value(exact, format->exact.v, coord_tile * 4, coord % 16, token));
    }
  }
}

// A pool for one sequence holds one, of any length up to its own, whatever the number of block sizes: here every layer
// has its own in each of three tiers.
TEST(OwnedPoolTest, HoldsASequenceOfManyBlockSizes) {
  const ModelGeometry geometry{4, 2, 1, 64, 64};
  Profile profile = UniformProfile("test", 1, geometry.n_layers, geometry.head_dim);
  profile.recent_tokens = 0;
  profile.sink_tokens = 16;
  for (const int bits : {8, 4}) {
    profile.young.push_back({2, UniformProfile("young", bits, geometry.n_layers, geometry.head_dim).layers});
  }
  for (int layer = 0; layer < geometry.n_layers; ++layer) {
    const auto set = [&](std::vector<KvShape>& layers, int bits) {
      const int width = 16 * (layer + 1);
      std::vector<kernels::KvRun>& runs = layers[static_cast<std::size_t>(layer)].v.runs;
      runs = {{bits, width}};
      if (width < geometry.head_dim) runs.push_back({0, geometry.head_dim - width});
    };
    set(profile.young[0].layers, 8);
    set(profile.young[1].layers, 4);
    set(profile.layers, 1);
  }
  const auto format = KvFormat::FromProfile(geometry, profile, /*exact_bits=*/16).value();
  constexpr int kLongest = 700, kStep = 256;
  const auto pool = OwnedPool::Create(*format, 1, kLongest, kStep).value();
  for (int n = 1; n <= kLongest; n += 37) {
    const auto kv = SequenceKv::Create(pool->pool(), format, n, kStep);
    EXPECT_TRUE(kv.ok()) << n << ": " << kv.status().message();
  }
}

TEST(SequenceKvTest, RefusalTakesNothing) {
  PoolFixture fixture(128 << 10);
  EXPECT_EQ(SequenceKv::Create(fixture.pool(), Format(3, 128, 16), 100000, 64).status().code(),
            StatusCode::kResourceExhausted);
  EXPECT_EQ(fixture.pool().usage().n_blocks_used, 0u);
  EXPECT_EQ(SequenceKv::Create(fixture.pool(), Format(3, 128, 16), 0, 64).status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace zeroc
