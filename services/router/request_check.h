// Checks a GenerateRequest and fills in what it leaves open, before any worker hears of it. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

namespace v1 {
class GenerateRequest;
class SamplingParams;
}  // namespace v1

struct RequestLimits {
  std::uint32_t vocab_size = 0;
  std::uint32_t max_positions = 0;         // prompt + output, tokens
  std::uint32_t default_max_tokens = 256;  // cut down to what the positions leave
  std::uint32_t prompt_tokens_max = 0;     // the operator's own limits; 0: none
  std::uint32_t output_tokens_max = 0;
  std::size_t prompt_bytes_max = 16 << 20;
  std::vector<std::uint32_t> eos_ids;  // what min_tokens keeps from being drawn
};

// The parts that need no tokens: id, prompt present, ranges of every sampling field, ids below vocab_size.
// kInvalidArgument naming the field.
Status CheckRequest(const v1::GenerateRequest& request, const RequestLimits& limits);

// Every field set: defaults, max_tokens, a seed (`fresh_seed` when the client gave none). Stop strings are left out,
// they are the router's. kInvalidArgument when the prompt is empty or prompt + max_tokens exceed max_positions or
// one of them its own limit.
// The request has passed CheckRequest.
Result<v1::SamplingParams> ResolveSampling(const v1::GenerateRequest& request, const RequestLimits& limits,
                                           std::size_t n_prompt_tokens, std::uint64_t fresh_seed);

// 1 to 128 printable ASCII characters, so that it can stand in logs and headers.
bool IsGoodRequestId(std::string_view id);

}  // namespace zeroc
