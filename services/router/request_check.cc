#include "services/router/request_check.h"

#include <algorithm>
#include <cmath>

#include "zeroc/v1/inference.pb.h"

namespace zeroc {
namespace {

constexpr int kStopStringsMax = 16;
constexpr std::size_t kStopStringBytesMax = 256;
constexpr int kStopTokensMax = 64;
constexpr std::uint32_t kLogprobsMax = 20;
constexpr int kLogitBiasMax = 1024;
constexpr std::size_t kRequestIdBytesMax = 128;

std::string Text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}

// `above` leaves the lower bound itself out: (min, max].
Status CheckRange(const char* field, double value, double min, double max, bool above = false) {
  const bool inside = std::isfinite(value) && value <= max && (above ? value > min : value >= min);
  if (inside) return OkStatus();
  return InvalidArgument(std::string(field) + " " + Text(value) + " is not in " + (above ? "(" : "[") + Text(min) +
                         ", " + Text(max) + "]");
}

Status CheckTokenId(const char* field, std::uint32_t id, const RequestLimits& limits) {
  if (id < limits.vocab_size) return OkStatus();
  return InvalidArgument(std::string(field) + ": token id " + std::to_string(id) + " is not below the vocabulary's " +
                         std::to_string(limits.vocab_size));
}

Status CheckSampling(const v1::SamplingParams& sampling, const RequestLimits& limits) {
  if (sampling.has_max_tokens() && sampling.max_tokens() == 0) return InvalidArgument("max_tokens is 0");
  if (sampling.has_temperature()) ZEROC_RETURN_IF_ERROR(CheckRange("temperature", sampling.temperature(), 0, 2));
  if (sampling.has_top_p()) ZEROC_RETURN_IF_ERROR(CheckRange("top_p", sampling.top_p(), 0, 1, true));
  if (sampling.has_min_p()) ZEROC_RETURN_IF_ERROR(CheckRange("min_p", sampling.min_p(), 0, 1));
  if (sampling.has_repetition_penalty()) {
    ZEROC_RETURN_IF_ERROR(CheckRange("repetition_penalty", sampling.repetition_penalty(), 0, 2, true));
  }
  if (sampling.has_presence_penalty()) {
    ZEROC_RETURN_IF_ERROR(CheckRange("presence_penalty", sampling.presence_penalty(), -2, 2));
  }
  if (sampling.has_frequency_penalty()) {
    ZEROC_RETURN_IF_ERROR(CheckRange("frequency_penalty", sampling.frequency_penalty(), -2, 2));
  }
  if (sampling.stop_size() > kStopStringsMax) {
    return InvalidArgument("stop has more than " + std::to_string(kStopStringsMax) + " strings");
  }
  for (const std::string& stop : sampling.stop()) {
    if (stop.empty() || stop.size() > kStopStringBytesMax) {
      return InvalidArgument("a stop string has " + std::to_string(stop.size()) + " bytes, not 1 to " +
                             std::to_string(kStopStringBytesMax));
    }
  }
  if (sampling.stop_token_ids_size() > kStopTokensMax) {
    return InvalidArgument("stop_token_ids has more than " + std::to_string(kStopTokensMax) + " ids");
  }
  for (const std::uint32_t id : sampling.stop_token_ids()) {
    ZEROC_RETURN_IF_ERROR(CheckTokenId("stop_token_ids", id, limits));
  }
  if (sampling.has_logprobs() && sampling.logprobs() > kLogprobsMax) {
    return InvalidArgument("logprobs " + std::to_string(sampling.logprobs()) + " is more than " +
                           std::to_string(kLogprobsMax));
  }
  if (sampling.logit_bias_size() > kLogitBiasMax) {
    return InvalidArgument("logit_bias has more than " + std::to_string(kLogitBiasMax) + " entries");
  }
  for (const auto& [id, bias] : sampling.logit_bias()) {
    ZEROC_RETURN_IF_ERROR(CheckTokenId("logit_bias", id, limits));
    ZEROC_RETURN_IF_ERROR(CheckRange("logit_bias", bias, -100, 100));
  }
  for (const std::uint32_t id : sampling.forced_ids()) ZEROC_RETURN_IF_ERROR(CheckTokenId("forced_ids", id, limits));
  return OkStatus();
}

// What the workers are told of min_tokens and forced_ids: positions instead of counts, so that a replay behind tokens
// that have been streamed already means the same.
Status ResolvePositions(const RequestLimits& limits, std::size_t n_prompt_tokens, v1::SamplingParams* sampling) {
  const auto check_count = [&](const char* field, std::uint64_t n) {
    if (n <= sampling->max_tokens()) return OkStatus();
    return InvalidArgument(std::string(field) + " " + std::to_string(n) + " is more than max_tokens " +
                           std::to_string(sampling->max_tokens()));
  };
  ZEROC_RETURN_IF_ERROR(check_count("min_tokens", sampling->min_tokens()));
  ZEROC_RETURN_IF_ERROR(check_count("forced_ids", static_cast<std::uint64_t>(sampling->forced_ids_size())));
  const auto n_prompt = static_cast<std::uint32_t>(n_prompt_tokens);
  sampling->set_forced_from(n_prompt);
  sampling->clear_suppress_ids();
  sampling->set_suppress_before(0);
  if (sampling->min_tokens() == 0) return OkStatus();
  sampling->set_suppress_before(n_prompt + sampling->min_tokens());
  *sampling->mutable_suppress_ids() = sampling->stop_token_ids();
  if (!sampling->ignore_eos()) sampling->mutable_suppress_ids()->Add(limits.eos_ids.begin(), limits.eos_ids.end());
  return OkStatus();
}

}  // namespace

bool IsGoodRequestId(std::string_view id) {
  return !id.empty() && id.size() <= kRequestIdBytesMax &&
         std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

Status CheckRequest(const v1::GenerateRequest& request, const RequestLimits& limits) {
  if (!request.request_id().empty() && !IsGoodRequestId(request.request_id())) {
    return InvalidArgument("request_id is not 1 to 128 printable ASCII characters without spaces");
  }
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      if (request.text().empty()) return InvalidArgument("prompt is empty");
      if (request.text().size() > limits.prompt_bytes_max) {
        return InvalidArgument("prompt has " + std::to_string(request.text().size()) + " bytes, more than " +
                               std::to_string(limits.prompt_bytes_max));
      }
      break;
    case v1::GenerateRequest::kTokenIds:
      if (request.token_ids().ids().empty()) return InvalidArgument("prompt is empty");
      for (const std::uint32_t id : request.token_ids().ids()) {
        ZEROC_RETURN_IF_ERROR(CheckTokenId("prompt", id, limits));
      }
      break;
    case v1::GenerateRequest::PROMPT_NOT_SET:
      return InvalidArgument("prompt is missing");
  }
  const auto check_slo = [](const char* field, double ms) { return CheckRange(field, ms, 0, 1e9, true); };
  if (request.has_ttft_slo_ms()) ZEROC_RETURN_IF_ERROR(check_slo("ttft_slo_ms", request.ttft_slo_ms()));
  if (request.has_tpot_slo_ms()) ZEROC_RETURN_IF_ERROR(check_slo("tpot_slo_ms", request.tpot_slo_ms()));
  return CheckSampling(request.sampling(), limits);
}

Result<v1::SamplingParams> ResolveSampling(const v1::GenerateRequest& request, const RequestLimits& limits,
                                           std::size_t n_prompt_tokens, std::uint64_t fresh_seed) {
  v1::SamplingParams sampling = request.sampling();
  if (n_prompt_tokens == 0) return InvalidArgument("prompt has no tokens");
  if (limits.prompt_tokens_max > 0 && n_prompt_tokens > limits.prompt_tokens_max) {
    return InvalidArgument("prompt has " + std::to_string(n_prompt_tokens) + " tokens, more than the " +
                           std::to_string(limits.prompt_tokens_max) + " that are allowed here");
  }
  const std::size_t left = limits.max_positions - std::min<std::size_t>(limits.max_positions, n_prompt_tokens);
  if (!sampling.has_max_tokens()) {
    sampling.set_max_tokens(static_cast<std::uint32_t>(std::clamp<std::size_t>(left, 1, limits.default_max_tokens)));
    if (limits.output_tokens_max > 0) {
      sampling.set_max_tokens(std::min(sampling.max_tokens(), limits.output_tokens_max));
    }
  }
  if (limits.output_tokens_max > 0 && sampling.max_tokens() > limits.output_tokens_max) {
    return InvalidArgument("max_tokens " + std::to_string(sampling.max_tokens()) + " is more than the " +
                           std::to_string(limits.output_tokens_max) + " that are allowed here");
  }
  if (sampling.max_tokens() > left) {
    return InvalidArgument("the prompt's " + std::to_string(n_prompt_tokens) + " tokens and max_tokens " +
                           std::to_string(sampling.max_tokens()) + " exceed the model's " +
                           std::to_string(limits.max_positions) + " positions");
  }
  sampling.clear_stop();
  if (!sampling.has_temperature()) sampling.set_temperature(1);
  if (!sampling.has_top_p()) sampling.set_top_p(1);
  if (!sampling.has_top_k()) sampling.set_top_k(0);
  if (!sampling.has_min_p()) sampling.set_min_p(0);
  if (!sampling.has_repetition_penalty()) sampling.set_repetition_penalty(1);
  if (!sampling.has_presence_penalty()) sampling.set_presence_penalty(0);
  if (!sampling.has_frequency_penalty()) sampling.set_frequency_penalty(0);
  if (!sampling.has_seed()) sampling.set_seed(fresh_seed);
  ZEROC_RETURN_IF_ERROR(ResolvePositions(limits, n_prompt_tokens, &sampling));
  return sampling;
}

}  // namespace zeroc
