#include "kernels/cuda/cases/cases.h"
#include "kernels/cuda/cuda_ops.h"

namespace zeroc::kernels::cuda {
namespace {

void CheckBf16(const std::vector<Bf16>& got, const std::vector<float>& expected, double relative, double absolute,
               Outcome& outcome) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    outcome.Check(Bf16ToFloat(got[i]), expected[i], relative * std::abs(double{expected[i]}) + absolute);
  }
}

void EmbedCase(Outcome& outcome) {
  Random random(1);
  for (const std::int64_t hidden : {1, 33, 300}) {
    const auto table = random.Bf16Normals(5 * hidden);
    const std::vector<std::int32_t> ids = {4, 0, 4, 2};
    for (const bool accumulate : {false, true}) {
      std::vector<float> expected = random.Normals(4 * hidden);
      const Buffer<Bf16> device_table(table);
      const Buffer<std::int32_t> device_ids(ids);
      const Buffer<float> out(expected);
      outcome.Done(Embed({device_table.data(), device_ids.data(), 4, hidden, out.data(), accumulate}, nullptr));
      ReferenceOps().embed({table.data(), ids.data(), 4, hidden, expected.data(), accumulate});
      outcome.Expect(out.ToHost() == expected, "embed: at most one addition, so the same numbers");
    }
  }
}

void RmsNormCase(Outcome& outcome) {
  Random random(2);
  for (const std::int64_t hidden : {1, 63, 384, 1025}) {
    auto x = random.Normals(3 * hidden, 3.0f);
    const auto gain = random.Bf16Normals(hidden);
    if (hidden == 63) x[70] = kNan;  // row 1 becomes NaN as a whole, its neighbours do not
    std::vector<float> expected(x.size());
    const Buffer<float> device_x(x);
    const Buffer<Bf16> device_gain(gain), out(x.size());
    outcome.Done(RmsNorm({device_x.data(), device_gain.data(), 3, hidden, 1e-5f, out.data()}, nullptr));
    ReferenceOps().rms_norm({x.data(), gain.data(), 3, hidden, 1e-5f, expected.data()});
    // One rounding to bf16, and a float32 sum of positive terms (the relative error halves under the root).
    CheckBf16(out.ToHost(), expected, kEpsBf16 + (static_cast<double>(hidden) / 2 + 4) * kEps32, 0, outcome);
  }
}

void LayerNormCase(Outcome& outcome) {
  Random random(3);
  for (const std::int64_t hidden : {1, 63, 384, 1025}) {
    auto x = random.Normals(3 * hidden, 3.0f);
    for (float& value : x) value += 10.0f;  // a mean that is not small beside the spread
    const auto gain = random.Bf16Normals(hidden);
    const auto bias = random.Normals(hidden);
    if (hidden == 63) x[70] = kNan;
    std::vector<float> expected(x.size());
    const Buffer<float> device_x(x), device_bias(bias);
    const Buffer<Bf16> device_gain(gain), out(x.size());
    outcome.Done(
        LayerNorm({device_x.data(), device_gain.data(), device_bias.data(), 3, hidden, 1e-5f, out.data()}, nullptr));
    ReferenceOps().layer_norm({x.data(), gain.data(), bias.data(), 3, hidden, 1e-5f, expected.data()});
    // The mean is off by some roundings of values near 10; the norm divides by a spread of 3, or sqrt(eps).
    const double spread = hidden == 1 ? std::sqrt(1e-5) : 1.0;
    const double slip = (static_cast<double>(hidden) + 8) * kEps32 * 16 / spread;
    const auto got = out.ToHost();
    for (std::size_t i = 0; i < got.size(); ++i) {
      const std::size_t column = i % static_cast<std::size_t>(hidden);
      const double terms = std::abs(expected[i] - bias[column]) + std::abs(double{Bf16ToFloat(gain[column])});
      outcome.Check(Bf16ToFloat(got[i]), expected[i], kEpsBf16 * std::abs(double{expected[i]}) + slip * terms);
    }
  }
}

void HeadNormCase(Outcome& outcome) {
  Random random(4);
  for (const std::int64_t head_dim : {16, 48, 128}) {
    const std::int64_t n_heads = 5, stride = n_heads * head_dim + 5;
    auto x = random.Normals(3 * stride, 4.0f);
    const auto gain = random.Bf16Normals(head_dim);
    if (head_dim == 48) x[60] = kNan;  // head 1 of row 0
    const Buffer<float> device_x(x);
    const Buffer<Bf16> device_gain(gain);
    outcome.Done(HeadNorm({device_x.data(), 3, stride, n_heads, head_dim, device_gain.data(), 1e-6f}, nullptr));
    auto expected = x;
    ReferenceOps().head_norm({expected.data(), 3, stride, n_heads, head_dim, gain.data(), 1e-6f});
    const auto got = device_x.ToHost();
    for (std::size_t i = 0; i < got.size(); ++i) {
      const bool in_head = static_cast<std::int64_t>(i) % stride < n_heads * head_dim;
      const double bound = in_head ? (static_cast<double>(head_dim) / 2 + 6) * kEps32 : 0;
      outcome.Check(got[i], expected[i], bound * std::abs(double{expected[i]}));
    }
  }
}

void SwiGluCase(Outcome& outcome) {
  Random random(5);
  for (const std::int64_t width : {1, 31, 600}) {
    const std::int64_t stride = 2 * width + 1;
    auto both = random.Normals(3 * stride, 4.0f);
    // The exponential must neither overflow nor turn NaN into a number.
    both[0] = 200.0f;
    both[static_cast<std::size_t>(stride)] = -200.0f;
    both[static_cast<std::size_t>(2 * stride)] = width == 31 ? kNan : 0.0f;
    std::vector<float> expected(static_cast<std::size_t>(3 * width));
    const Buffer<float> device(both);
    const Buffer<Bf16> out(expected.size());
    outcome.Done(SwiGlu({device.data(), device.data() + width, 3, width, stride, out.data()}, nullptr));
    ReferenceOps().swiglu({both.data(), both.data() + width, 3, width, stride, expected.data()});
    // The GPU's fast exponential errs by 2 ulp and, in its argument of up to 200, by one more each 2^-1 of it.
    CheckBf16(out.ToHost(), expected, kEpsBf16 + 3e-5, 1e-34, outcome);
  }
}

void ReluCase(Outcome& outcome) {
  Random random(6);
  for (const std::int64_t width : {1, 31, 600}) {
    const std::int64_t stride = width + 3;
    auto x = random.Normals(3 * stride, 4.0f);
    x[static_cast<std::size_t>(stride)] = kNan;
    std::vector<float> expected(static_cast<std::size_t>(3 * width));
    const Buffer<float> device(x);
    const Buffer<Bf16> out(expected.size());
    outcome.Done(Relu({device.data(), 3, width, stride, out.data()}, nullptr));
    ReferenceOps().relu({x.data(), 3, width, stride, expected.data()});
    const auto got = out.ToHost();
    for (std::size_t i = 0; i < got.size(); ++i) outcome.Expect(got[i] == FloatToBf16(expected[i]), "relu rounds once");
  }
}

void BadRowsCase(Outcome& outcome) {
  const Buffer<float> x(4);
  const Buffer<Bf16> gain(4);
  const auto refused = [&](KernelStatus status) {
    outcome.Expect(status == KernelStatus::kBadShape, "bad shape taken");
  };
  refused(RmsNorm({x.data(), gain.data(), 1, 0, 1e-5f, gain.data()}, nullptr));
  refused(LayerNorm({x.data(), gain.data(), nullptr, 1, 4, 1e-5f, gain.data()}, nullptr));
  refused(HeadNorm({x.data(), 1, 3, 2, 2, gain.data(), 1e-5f}, nullptr));
  refused(SwiGlu({x.data(), x.data(), 1, 4, 3, gain.data()}, nullptr));
  refused(Relu({nullptr, 1, 4, 4, gain.data()}, nullptr));
  refused(Embed({gain.data(), nullptr, 1, 4, x.data()}, nullptr));
  outcome.Done(Relu({nullptr, 0, 4, 4, nullptr}, nullptr));  // no rows: nothing to do
}

constexpr Case kCases[] = {
    {"rows", "embed", EmbedCase},        {"rows", "rms_norm", RmsNormCase}, {"rows", "layer_norm", LayerNormCase},
    {"rows", "head_norm", HeadNormCase}, {"rows", "swiglu", SwiGluCase},    {"rows", "relu", ReluCase},
    {"rows", "bad shapes", BadRowsCase},
};

}  // namespace

std::span<const Case> RowCases() { return kCases; }

}  // namespace zeroc::kernels::cuda
