// Workers whose model is on a device (its emulation): keys and values pass through the wire side of their pools, cached
// beginnings stay on the device.
#include "libzeroc/engine/local_generator.h"
#include "libzeroc/model/cuda/cuda_transformer.h"
#include "services/prefill/worker_pair_testing.h"

namespace zeroc::testing {
namespace {

constexpr int kPromptTokens = 200;  // packed blocks, a sink, an exact tail
constexpr int kNewTokens = 4;
constexpr char kProfile[] = "q4";

enum class DeviceSide { kPrefill, kDecode };

class DevicePairTest : public ::testing::TestWithParam<DeviceSide> {
 protected:
  DevicePairTest()
      : models_(GetParam() == DeviceSide::kPrefill ? OpenDevice(OpenCudaTransformer) : nullptr,
                GetParam() == DeviceSide::kDecode ? OpenDevice(OpenCudaTransformer) : nullptr),
        cluster_(WireKind::kLoopbackPut, Cluster::DecodeOptions(30'000, 24 << 20), models_) {}

  std::vector<std::int32_t> Alone(const std::vector<std::int32_t>& prompt) {
    SamplingParams sampling;
    sampling.max_tokens = kNewTokens;
    sampling.temperature = 0;
    sampling.ignore_eos = true;
    WorkerModel& alone = *models_.alone;
    return Must(GenerateLocally(alone.model(), alone.formats().at(kProfile), prompt, sampling)).ids;
  }

  struct Answer {
    Outcome outcome;
    std::uint32_t n_present;  // tokens that decode did not want
  };
  Answer Ask(const std::vector<std::int32_t>& prompt) {
    v1::ReserveRequest reserve = cluster_.ReserveFor(static_cast<int>(prompt.size()), kNewTokens, kProfile);
    reserve.mutable_prompt_ids()->Assign(prompt.begin(), prompt.end());
    v1::ReserveResponse reserved;
    EXPECT_TRUE(cluster_.Reserve(reserve, &reserved).ok());
    Answer answer{cluster_.Run(reserve, reserved.lease(), prompt, Sampling(kNewTokens)), reserved.n_cached_tokens()};
    EXPECT_TRUE(answer.outcome.prefill.ok()) << answer.outcome.prefill.error_message();
    EXPECT_TRUE(answer.outcome.decode.ok()) << answer.outcome.decode.error_message();
    EXPECT_TRUE(cluster_.Settles());
    return answer;
  }

  Models models_;
  Cluster cluster_;
};

TEST_P(DevicePairTest, GeneratesWhatOneProcessDoes) {
  const std::vector<std::int32_t> prompt = Prompt(kPromptTokens);
  const Answer cold = Ask(prompt);
  EXPECT_EQ(cold.outcome.ids, Alone(prompt));
  EXPECT_EQ(cold.n_present, 0u);
  EXPECT_EQ(cold.outcome.done.kv_bytes().wire(), cold.outcome.done.kv_bytes().packed());

  const Answer warm = Ask(prompt);
  EXPECT_EQ(warm.outcome.ids, cold.outcome.ids);
  EXPECT_GT(warm.n_present, 0u);
  EXPECT_LT(warm.outcome.done.kv_bytes().wire(), cold.outcome.done.kv_bytes().wire());
}

// A leader whose prompts would fail asks somebody else.
TEST_P(DevicePairTest, ADeviceIsNoRankOfAGroupYet) {
  v1::JoinGroupResponse response;  // on the CPU it gets as far as the model, which the request does not name
  EXPECT_EQ(cluster_.prefill().JoinGroup({}, &response).code(),
            GetParam() == DeviceSide::kPrefill ? StatusCode::kUnimplemented : StatusCode::kFailedPrecondition);
}

INSTANTIATE_TEST_SUITE_P(Sides, DevicePairTest, ::testing::Values(DeviceSide::kPrefill, DeviceSide::kDecode),
                         [](const auto& side) {
                           return side.param == DeviceSide::kPrefill ? "PrefillOnTheDevice" : "DecodeOnTheDevice";
                         });

}  // namespace
}  // namespace zeroc::testing
