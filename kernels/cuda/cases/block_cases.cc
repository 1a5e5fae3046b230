// Matrix products, whole blocks (checksums and copies), and a recorded step.
#include <memory>

#include "kernels/cuda/cases/cases.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/graph.h"
#include "kernels/cuda/linear.h"

namespace zeroc::kernels::cuda {
namespace {

void LinearCase(Outcome& outcome) {
  const char* error = nullptr;
  const std::unique_ptr<Linear> linear = Linear::Open(nullptr, &error);
  outcome.Expect(linear != nullptr, error == nullptr ? "no handle" : error);
  if (linear == nullptr) return;
  struct Shape {
    std::int64_t n_rows, k, n_out, begin, end;
    bool bias, accumulate;
  };
  for (const Shape& s : {Shape{1, 64, 300, 0, 300, false, false}, Shape{5, 48, 96, 16, 80, true, false},
                         Shape{33, 200, 40, 0, 40, true, true}, Shape{2, 16, 8, 3, 3, true, true}}) {
    Random random(static_cast<unsigned>(s.n_out));
    const auto x = random.Bf16Normals(s.n_rows * s.k), w = random.Bf16Normals(s.n_out * s.k);
    const auto bias = random.Normals(s.n_out);
    const std::int64_t stride = s.n_out + 3;
    auto y = random.Normals(s.n_rows * stride);
    std::vector<float> wide(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) wide[i] = Bf16ToFloat(x[i]);
    const Buffer<Bf16> device_x(x), device_w(w);
    const Buffer<float> device_bias(bias), device_y(y);
    outcome.Done(linear->Run({device_x.data(), s.n_rows, s.k, device_w.data(), s.bias ? device_bias.data() : nullptr,
                              s.n_out, s.begin, s.end, device_y.data(), stride, s.accumulate}));
    const auto before = y;
    ReferenceOps().linear({wide.data(), s.n_rows, s.k, w.data(), s.bias ? bias.data() : nullptr, s.n_out, s.begin,
                           s.end, y.data(), stride, s.accumulate});
    const auto got = device_y.ToHost();
    for (std::int64_t r = 0; r < s.n_rows; ++r) {
      for (std::int64_t o = 0; o < stride; ++o) {
        const auto at = static_cast<std::size_t>(r * stride + o);
        double terms = 0;  // float32 sums in any order, on both sides
        for (std::int64_t i = 0; o < s.n_out && i < s.k; ++i) {
          terms += std::abs(double{wide[static_cast<std::size_t>(r * s.k + i)]} *
                            Bf16ToFloat(w[static_cast<std::size_t>(o * s.k + i)]));
        }
        const bool is_written = o >= s.begin && o < s.end;
        const double bound = 2 * static_cast<double>(s.k + 4) * kEps32 * (terms + 2 + std::abs(double{before[at]}));
        outcome.Check(got[at], y[at], is_written ? bound : 0);
      }
    }
  }
  outcome.Expect(linear->Run({nullptr, 1, 4, nullptr, nullptr, 1, 0, 2, nullptr, 1, false}) == KernelStatus::kBadShape,
                 "bad shape taken");
}

// Blocks in a buffer, `stride` bytes apart, of known bytes; the hashes are those of libxxhash 0.8.1.
void ChecksumCase(Outcome& outcome) {
  struct Golden {
    int bytes;
    std::uint64_t hash;
  };
  constexpr Golden kGolden[] = {{248, 0x448b0ae84a917d4bu},  {256, 0x01de8b22604b902au},  {1024, 0xb8756b20ce66095fu},
                                {1032, 0xbdeb79947a22fad5u}, {1088, 0x7dd210bc5a600b3fu}, {2048, 0x987fd563b6d9069bu},
                                {12352, 0xcae210fb63406e7eu}};
  for (const Golden& golden : kGolden) {
    constexpr int kBlocks = 19;  // more than one thread block, the last not full
    const std::size_t stride = static_cast<std::size_t>(golden.bytes) + 16;
    std::vector<std::uint8_t> bytes(kBlocks * stride);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const auto at = static_cast<std::uint32_t>(i % stride);
      bytes[i] = static_cast<std::uint8_t>(at * at * 7u + at * 13u + (at >> 8));
    }
    bytes[4 * stride + 100] ^= 1;  // one bit of block 4
    const Buffer<std::uint8_t> device(bytes);
    std::vector<const std::uint8_t*> pointers;
    for (std::size_t b = 0; b < kBlocks; ++b) pointers.push_back(device.data() + b * stride);
    const Buffer<const std::uint8_t*> table(pointers);
    const Buffer<std::uint64_t> out(kBlocks);
    outcome.Done(BlockChecksums({table.data(), kBlocks, golden.bytes, out.data()}, nullptr));
    const auto got = out.ToHost();
    for (std::size_t b = 0; b < kBlocks; ++b) {
      outcome.Expect((got[b] == golden.hash) == (b != 4), "XXH3 of " + std::to_string(golden.bytes) + " bytes");
    }
  }
  outcome.Expect(BlockChecksums({nullptr, 1, 240, nullptr}, nullptr) == KernelStatus::kBadShape, "short blocks");
}

void CopyCase(Outcome& outcome) {
  constexpr int kBlocks = 5, kBytes = 16 * 143;
  Random random(3);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kBlocks) * (kBytes + 32));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.Below(256));
  const Buffer<std::uint8_t> scattered(bytes), line(static_cast<std::size_t>(kBlocks) * kBytes);
  std::vector<std::uint8_t*> pointers;
  const auto place = [](std::size_t b) { return (b * 3 % kBlocks) * (kBytes + 32) + 16; };
  for (std::size_t b = 0; b < kBlocks; ++b) pointers.push_back(scattered.data() + place(b));
  const Buffer<std::uint8_t*> table(pointers);
  outcome.Done(GatherBlocks({table.data(), kBlocks, kBytes, line.data()}, nullptr));
  auto got = line.ToHost();
  for (std::size_t b = 0; b < kBlocks; ++b) {
    outcome.Expect(std::memcmp(got.data() + b * kBytes, bytes.data() + place(b), kBytes) == 0, "gathered");
  }
  for (std::uint8_t& byte : got) byte = static_cast<std::uint8_t>(~byte);
  const Buffer<std::uint8_t> sent(got);
  outcome.Done(ScatterBlocks({table.data(), kBlocks, kBytes, sent.data()}, nullptr));
  for (std::size_t b = 0; b < kBlocks; ++b) {
    for (std::size_t i = 0; i < kBytes; ++i) bytes[place(b) + i] = static_cast<std::uint8_t>(~bytes[place(b) + i]);
  }
  outcome.Expect(scattered.ToHost() == bytes, "scattered, and nothing between the blocks");
  outcome.Expect(GatherBlocks({table.data(), 1, 24, line.data()}, nullptr) == KernelStatus::kBadShape, "odd bytes");
}

struct StreamOwner {
  Stream stream = CreateStream();
  ~StreamOwner() { DestroyStream(stream); }
};

// Embedding, norm and product, recorded once and launched for other tokens.
void GraphCase(Outcome& outcome) {
  const std::int64_t hidden = 64, n_out = 48, n_rows = 3;
  Random random(12);
  const auto table = random.Bf16Normals(9 * hidden), gain = random.Bf16Normals(hidden),
             w = random.Bf16Normals(n_out * hidden);
  const Buffer<Bf16> device_table(table), device_gain(gain), device_w(w),
      act(static_cast<std::size_t>(n_rows * hidden));
  const Buffer<std::int32_t> ids(static_cast<std::size_t>(n_rows));
  const Buffer<float> x(static_cast<std::size_t>(n_rows * hidden)), y(static_cast<std::size_t>(n_rows * n_out));
  const StreamOwner owner;  // also where an expectation ends the case
  const Stream stream = owner.stream;
  const char* error = nullptr;
  const std::unique_ptr<Linear> linear = Linear::Open(stream, &error);
  outcome.Expect(linear != nullptr, error == nullptr ? "no handle" : error);
  if (linear == nullptr) return;
  const auto step = [&] {
    KernelStatus status = Embed({device_table.data(), ids.data(), n_rows, hidden, x.data()}, stream);
    if (status == KernelStatus::kOk) {
      status = RmsNorm({x.data(), device_gain.data(), n_rows, hidden, 1e-5f, act.data()}, stream);
    }
    if (status != KernelStatus::kOk) return status;
    return linear->Run({act.data(), n_rows, hidden, device_w.data(), nullptr, n_out, 0, n_out, y.data(), n_out, false});
  };
  const std::unique_ptr<Graph> graph = Graph::Record(stream, step, &error);
  outcome.Expect(graph != nullptr, error == nullptr ? "no graph" : error);
  std::vector<std::vector<float>> results;
  for (const std::vector<std::int32_t>& tokens : {std::vector<std::int32_t>{0, 5, 8}, {8, 8, 1}}) {
    if (graph == nullptr) break;
    CopyToDevice(ids.data(), tokens.data(), tokens.size() * sizeof(std::int32_t), stream);
    outcome.Expect(graph->Launch() == KernelStatus::kOk && Synchronize(stream) == nullptr, "launch");
    results.push_back(y.ToHost());
    step();  // the same once more without the graph
    outcome.Expect(Synchronize(stream) == nullptr, "step");
    outcome.Expect(y.ToHost() == results.back(), "a launched graph is the step that was recorded");
  }
  if (results.size() == 2) {
    const auto row = [&](std::size_t result, std::size_t r) {
      const auto begin = results[result].begin() + static_cast<std::ptrdiff_t>(r) * n_out;
      return std::vector<float>(begin, begin + n_out);
    };
    outcome.Expect(row(0, 2) == row(1, 0) && row(1, 0) == row(1, 1) && row(0, 0) != row(1, 0),
                   "for the tokens of each launch");
  }
  const auto refuses = [&] { return Embed({nullptr, nullptr, 1, 4, nullptr}, stream); };
  outcome.Expect(Graph::Record(stream, refuses, &error) == nullptr && error != nullptr, "a refused op");
}

constexpr Case kCases[] = {
    {"graph", "record and launch", GraphCase},
    {"linear", "linear", LinearCase},
    {"blocks", "checksums", ChecksumCase},
    {"blocks", "gather and scatter", CopyCase},
};

}  // namespace

std::span<const Case> BlockCases() { return kCases; }

}  // namespace zeroc::kernels::cuda
