#include "services/worker/proto_convert.h"

#include <cstdint>
#include <limits>

namespace zeroc {
namespace {

constexpr std::uint32_t kIntMax = std::numeric_limits<std::int32_t>::max();

}  // namespace

Result<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto) {
  SamplingParams params;
  if (proto.max_tokens() > kIntMax || proto.top_k() > kIntMax || proto.logprobs() > kIntMax ||
      proto.forced_from() > kIntMax || proto.suppress_before() > kIntMax) {
    return InvalidArgument("sampling: max_tokens, top_k, logprobs or a position is out of range");
  }
  if (proto.has_max_tokens()) params.max_tokens = static_cast<int>(proto.max_tokens());
  if (proto.has_temperature()) params.temperature = proto.temperature();
  if (proto.has_top_p()) params.top_p = proto.top_p();
  if (proto.has_top_k()) params.top_k = static_cast<int>(proto.top_k());
  if (proto.has_min_p()) params.min_p = proto.min_p();
  if (proto.has_repetition_penalty()) params.repetition_penalty = proto.repetition_penalty();
  if (proto.has_presence_penalty()) params.presence_penalty = proto.presence_penalty();
  if (proto.has_frequency_penalty()) params.frequency_penalty = proto.frequency_penalty();
  params.seed = proto.seed();
  params.ignore_eos = proto.ignore_eos();
  if (proto.has_logprobs()) params.logprobs = static_cast<int>(proto.logprobs());
  for (const std::uint32_t id : proto.stop_token_ids()) {
    if (id > kIntMax) return InvalidArgument("sampling: stop token id " + std::to_string(id) + " is out of range");
    params.stop_ids.push_back(static_cast<std::int32_t>(id));
  }
  for (const std::uint32_t id : proto.forced_ids()) {
    if (id > kIntMax) return InvalidArgument("sampling: forced token id " + std::to_string(id) + " is out of range");
    params.forced_ids.push_back(static_cast<std::int32_t>(id));
  }
  for (const std::uint32_t id : proto.suppress_ids()) {
    if (id > kIntMax) return InvalidArgument("sampling: token id " + std::to_string(id) + " is out of range");
    params.suppress_ids.push_back(static_cast<std::int32_t>(id));
  }
  params.forced_from = static_cast<int>(proto.forced_from());
  params.suppress_before = static_cast<int>(proto.suppress_before());
  for (const auto& [id, bias] : proto.logit_bias()) {
    if (id > kIntMax)
      return InvalidArgument("sampling: logit_bias of token " + std::to_string(id) + " is out of range");
    params.logit_bias.emplace_back(static_cast<std::int32_t>(id), bias);
  }
  return params;
}

std::vector<std::int32_t> IdsFromProto(const google::protobuf::RepeatedField<std::uint32_t>& ids) {
  std::vector<std::int32_t> out;
  out.reserve(static_cast<std::size_t>(ids.size()));
  for (const std::uint32_t id : ids) out.push_back(id > kIntMax ? -1 : static_cast<std::int32_t>(id));
  return out;
}

v1::TokenLogprobs LogprobsToProto(const SampledToken& token) {
  v1::TokenLogprobs proto;
  proto.set_token_id(static_cast<std::uint32_t>(token.id));
  proto.set_logprob(token.logprob);
  for (const auto& [id, logprob] : token.top) {
    v1::TopLogprob* top = proto.add_top();
    top->set_token_id(static_cast<std::uint32_t>(id));
    top->set_logprob(logprob);
  }
  return proto;
}

v1::FinishReason FinishToProto(FinishReason reason) {
  return reason == FinishReason::kStop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH;
}

}  // namespace zeroc
