// What the router knows of the model that its workers serve: tokenizer, limits, the plan's ladder. No weights.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/tokenizer/chat_template.h"
#include "services/router/policy.h"
#include "services/router/text_codec.h"

namespace zeroc {

struct ServedModel {
  std::string name;  // what clients call it
  std::string fingerprint;
  std::string plan_id;
  std::uint32_t max_positions = 0;  // tokens
  std::uint32_t vocab_size = 0;
  std::vector<std::uint32_t> eos_ids;
  double ppl_base = 0;
  std::vector<Rung> ladder;
  std::shared_ptr<const TextCodec> codec;
  std::shared_ptr<const ChatTemplate> chat_template = ChatTemplate::Default();
  std::string tokenizer_info = "{}";  // tokenizer_config.json with the chat template in it, as JSON text
};

// Reads config.json, tokenizer.json and the plan (dir/zeroc.plan when plan_path is empty); the name defaults to the
// directory's. Errors name the file. The plan's model is not checked against the weights here: workers do that and
// bring the fingerprint with them.
Result<ServedModel> LoadServedModel(const std::string& dir, const std::string& plan_path, const std::string& name);

}  // namespace zeroc
