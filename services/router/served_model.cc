#include "services/router/served_model.h"

#include <filesystem>
#include <utility>

#include "libzeroc/checkpoint/model_config.h"
#include "libzeroc/compression/plan.h"
#include "libzeroc/tokenizer/config_files.h"
#include "libzeroc/tokenizer/streaming_decoder.h"
#include "libzeroc/tokenizer/tokenizer.h"

namespace zeroc {
namespace {

class TokenizerStream : public TextStream {
 public:
  explicit TokenizerStream(const Tokenizer& tokenizer) : decoder_(tokenizer, /*skip_special=*/true) {}
  std::string Push(std::uint32_t token_id) override { return decoder_.Push(static_cast<int>(token_id)); }
  std::string Flush() override { return decoder_.Flush(); }

 private:
  StreamingDecoder decoder_;
};

class TokenizerCodec : public TextCodec {
 public:
  explicit TokenizerCodec(std::unique_ptr<Tokenizer> tokenizer) : tokenizer_(std::move(tokenizer)) {}

  Result<std::vector<std::uint32_t>> EncodePrompt(std::string_view text) const override {
    std::vector<int> ids;
    ZEROC_ASSIGN_OR_RETURN(ids, tokenizer_->EncodePrompt(text));
    return std::vector<std::uint32_t>(ids.begin(), ids.end());
  }
  Result<std::vector<std::uint32_t>> EncodeText(std::string_view text) const override {
    std::vector<int> ids;
    ZEROC_ASSIGN_OR_RETURN(ids, tokenizer_->Encode(text));
    return std::vector<std::uint32_t>(ids.begin(), ids.end());
  }
  std::unique_ptr<TextStream> NewStream() const override { return std::make_unique<TokenizerStream>(*tokenizer_); }
  // Through a stream, so that part of a character is U+FFFD and the result can stand in JSON.
  std::string TokenText(std::uint32_t token_id) const override {
    StreamingDecoder decoder(*tokenizer_, /*skip_special=*/false);
    std::string text = decoder.Push(static_cast<int>(token_id));
    return text + decoder.Flush();
  }
  std::string TokenBytes(std::uint32_t token_id) const override {
    const int id = static_cast<int>(token_id);
    return tokenizer_->Decode(std::span(&id, 1));
  }
  std::string Decode(std::span<const std::uint32_t> ids) const override {
    StreamingDecoder decoder(*tokenizer_, /*skip_special=*/false);
    std::string text;
    for (const std::uint32_t id : ids) text += decoder.Push(static_cast<int>(id));
    return text + decoder.Flush();
  }

 private:
  const std::unique_ptr<Tokenizer> tokenizer_;
};

Result<std::vector<Rung>> LadderOf(const Plan& plan) {
  std::vector<Rung> ladder;
  for (const Profile& profile : plan.ladder()) {
    Result<ProfileLayouts> layouts = ProfileLayouts::Make(profile, plan.geometry());
    if (!layouts.ok()) return layouts.status().WithContext("profile " + profile.name);
    Rung rung;
    rung.name = profile.name;
    rung.kv_bytes_per_token = profile.cost.kv_bytes_per_token;
    rung.measured = profile.cost.measured;
    rung.ppl_increase = profile.cost.ppl_increase;
    rung.recall = profile.cost.recall;
    rung.layout_hash = layouts->layout_hash;
    ladder.push_back(std::move(rung));
  }
  return ladder;
}

}  // namespace

Result<ServedModel> LoadServedModel(const std::string& dir, const std::string& plan_path, const std::string& name) {
  Result<ModelConfig> config = LoadModelConfig(dir);
  if (!config.ok()) return config.status();
  Result<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Open(dir);
  if (!tokenizer.ok()) return tokenizer.status();
  const std::string plan_file = plan_path.empty() ? dir + "/zeroc.plan" : plan_path;
  Result<Plan> plan = Plan::Open(plan_file);
  if (!plan.ok()) return plan.status();
  if (plan->geometry() != GeometryOf(*config)) {
    return FailedPrecondition(plan_file + ": made for a model of another shape than " + dir + "/config.json");
  }

  ServedModel model;
  const std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  model.name = !name.empty() ? name : (path.has_filename() ? path : path.parent_path()).filename().string();
  model.fingerprint = plan->model_fingerprint();
  model.plan_id = plan->plan_id();
  model.max_positions = static_cast<std::uint32_t>(config->max_positions);
  model.vocab_size = static_cast<std::uint32_t>(config->vocab_size);
  model.eos_ids.assign(config->eos_ids.begin(), config->eos_ids.end());
  model.ppl_base = plan->ppl_base();
  ZEROC_ASSIGN_OR_RETURN(model.ladder, LadderOf(*plan));
  model.codec = std::make_shared<TokenizerCodec>(std::move(*tokenizer));
  ZEROC_ASSIGN_OR_RETURN(model.chat_template, ChatTemplate::Open(dir));
  ZEROC_ASSIGN_OR_RETURN(model.tokenizer_info, TokenizerInfo(dir));
  return model;
}

}  // namespace zeroc
