// Bodies of HTTP requests from strangers: reading, planning and answering never crash, and what is refused says why.
// The first byte chooses the path.
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "libzeroc/base/check.h"
#include "services/router/completions_api.h"
#include "services/router/request_check.h"
#include "services/router/test_router.h"

namespace zeroc {
namespace {

void CheckRefusal(const Status& status) {
  ZEROC_CHECK(status.code() == StatusCode::kInvalidArgument, status.ToString());
  ZEROC_CHECK(nlohmann::json::accept(ErrorBody(400, status.message())));
}

// What the router makes of a request without any worker.
void CheckChoice(const ChoicePlan& plan) {
  RequestLimits limits;
  limits.vocab_size = 300;
  limits.max_positions = 1000;
  if (!CheckRequest(plan.generate, limits).ok()) return;
  const std::size_t n_prompt = plan.generate.has_text()
                                   ? plan.generate.text().size()
                                   : static_cast<std::size_t>(plan.generate.token_ids().ids_size());
  const Result<v1::SamplingParams> sampling = ResolveSampling(plan.generate, limits, n_prompt, 1);
  if (!sampling.ok()) return CheckRefusal(sampling.status());
  ZEROC_CHECK(n_prompt + sampling->max_tokens() <= limits.max_positions, n_prompt, sampling->max_tokens());
}

void Complete(const Result<CompletionRequest>& parsed) {
  if (!parsed.ok()) return CheckRefusal(parsed.status());
  CompletionRequest request = *parsed;
  if (request.kind == ApiKind::kChat) {
    const auto text = ChatTemplate::Default()->Render(request.messages, request.add_generation_prompt);
    if (!text.ok()) return;
    request.prompts.emplace_back(*text);
  }
  const ByteCodec codec;
  Result<std::vector<ChoicePlan>> plans = PlanChoices(request, codec, 16);
  if (!plans.ok()) return CheckRefusal(plans.status());
  for (const ChoicePlan& plan : *plans) CheckChoice(plan);
  CompletionFormatter formatter(request.kind, "id", 1, "m", codec, request.shape, std::move(*plans));
  v1::Delta delta;
  delta.set_text("x");
  delta.add_token_ids('x');
  formatter.AddDelta(0, delta);
  formatter.AddFinal(0, {});
  ZEROC_CHECK(nlohmann::json::accept(formatter.Body()));
}

}  // namespace
}  // namespace zeroc

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace zeroc;
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 4) {
    case 0:
      Complete(ParseCompletionRequest(body));
      break;
    case 1:
      Complete(ParseChatRequest(body));
      break;
    case 2: {
      const auto request = ParseTokenizeRequest(body);
      if (!request.ok()) CheckRefusal(request.status());
      break;
    }
    default: {
      const auto ids = ParseDetokenizeRequest(body);
      if (!ids.ok()) CheckRefusal(ids.status());
      if (ids.ok()) ZEROC_CHECK(nlohmann::json::accept(DetokenizeBody(ByteCodec().Decode(*ids))));
    }
  }
  return 0;
}
