// The answer to one request, whichever attempts its tokens come from: ids, text, stop strings, the limit. No I/O.
//
// Not thread-safe: its flow's lock guards it.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/tokenizer/stop_matcher.h"
#include "services/router/text_codec.h"
#include "zeroc/v1/inference.pb.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

class Answer {
 public:
  // include_stop: what ended the answer, stop string or stop token, is part of its text.
  Answer(std::unique_ptr<TextStream> text, std::vector<std::string> stop_strings, bool include_stop);
  // Before the first Add. The first n_forced tokens are the client's own: they have no text and stop nothing.
  void SetLimits(std::uint32_t max_tokens, std::set<std::uint32_t> stop_token_ids, std::uint32_t n_forced);

  // What the client gets for tokens that continue the answer. Those behind a stop string are left out. kInternal, with
  // nothing taken, when they are more than max_tokens leaves.
  Result<v1::Delta> Add(const v1::Tokens& tokens);
  bool stop_string_found() const { return stop_string_found_; }
  const std::string& stop_string() const { return stop_string_; }
  bool IsStopToken(std::uint32_t id) const { return stop_token_ids_.contains(id); }
  bool is_full() const { return ids_.size() >= max_tokens_; }

  // Ends the answer, once, and returns the text that was held back.
  std::string Finish(v1::FinishReason reason);
  bool finished() const { return finish_reason_ != v1::FINISH_REASON_UNSPECIFIED; }
  v1::FinishReason finish_reason() const { return finish_reason_; }

  // All tokens that the client has been given.
  const std::vector<std::uint32_t>& ids() const { return ids_; }

 private:
  std::unique_ptr<TextStream> text_;
  StopMatcher stops_;
  bool include_stop_;
  std::set<std::uint32_t> stop_token_ids_;
  std::uint32_t max_tokens_ = 0;
  std::uint32_t n_forced_ = 0;
  std::vector<std::uint32_t> ids_;
  bool stop_string_found_ = false;
  std::string stop_string_;
  v1::FinishReason finish_reason_ = v1::FINISH_REASON_UNSPECIFIED;
};

}  // namespace zeroc
