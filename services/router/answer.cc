#include "services/router/answer.h"

#include <utility>

namespace zeroc {

Answer::Answer(std::unique_ptr<TextStream> text, std::vector<std::string> stop_strings, bool include_stop)
    : text_(std::move(text)), stops_(std::move(stop_strings)), include_stop_(include_stop) {}

void Answer::SetLimits(std::uint32_t max_tokens, std::set<std::uint32_t> stop_token_ids, std::uint32_t n_forced) {
  max_tokens_ = max_tokens;
  n_forced_ = n_forced;
  stop_token_ids_ = std::move(stop_token_ids);
}

Result<v1::Delta> Answer::Add(const v1::Tokens& tokens) {
  v1::Delta delta;
  const std::size_t left = max_tokens_ - std::min<std::size_t>(max_tokens_, ids_.size());
  if (static_cast<std::size_t>(tokens.ids_size()) > left) return Internal("sent more than max_tokens tokens");
  for (int i = 0; i < tokens.ids_size() && !stop_string_found_; ++i) {
    ids_.push_back(tokens.ids(i));
    delta.add_token_ids(tokens.ids(i));
    if (i < tokens.logprobs_size()) *delta.add_logprobs() = tokens.logprobs(i);
    const bool forced = ids_.size() <= n_forced_;
    if (forced || (IsStopToken(tokens.ids(i)) && !include_stop_)) continue;
    StopMatcher::Output output = stops_.Push(text_->Push(tokens.ids(i)));
    delta.mutable_text()->append(output.text);
    stop_string_found_ = output.stopped;
    stop_string_ = std::move(output.stop);
    if (include_stop_) delta.mutable_text()->append(stop_string_);
  }
  return delta;
}

std::string Answer::Finish(v1::FinishReason reason) {
  finish_reason_ = reason;
  if (stop_string_found_) return {};  // the rest is cut off
  StopMatcher::Output output = stops_.Push(text_->Flush());
  return output.stopped ? output.text : output.text + stops_.Flush();
}

}  // namespace zeroc
