// zeroc tokenize, zeroc detokenize.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <nlohmann/json.hpp>

#include "libzeroc/tokenizer/tokenizer.h"
#include "libzeroc/tokenizer/utf8.h"
#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/text_input.h"

namespace zeroc {
namespace {

class TokenizeCommand : public Command {
 public:
  explicit TokenizeCommand(CLI::App& app) {
    app.add_option("--model", model_dir_, "directory with tokenizer.json")->required()->option_text("DIR");
    auto* source = app.add_option_group("source");
    text_option_ = source->add_option("--text", text_, "the text itself")->option_text("TEXT");
    source->add_option("--file", file_, "file with the text, taken as bytes")->option_text("FILE");
    source->require_option(1);
    app.add_flag("--add-special", options_.add_special, "add what the post-processor adds around a text (BOS)");
    app.add_flag("!--no-parse-special", options_.parse_special,
                 "take special tokens written in the text, such as <|eos|>, as ordinary text");
    app.add_flag("--json", json_, "print {\"ids\":[..]}");
  }

  Status Run() override {
    if (text_option_->count() == 0) {
      ZEROC_ASSIGN_OR_RETURN(text_, ReadFile(file_));
    }
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Open(model_dir_));
    ZEROC_ASSIGN_OR_RETURN(const std::vector<int> ids, tokenizer->Encode(text_, options_));
    if (json_) {
      PrintJson({{"ids", ids}});
      return OkStatus();
    }
    for (std::size_t i = 0; i < ids.size(); ++i) std::cout << (i > 0 ? "," : "") << ids[i];
    std::cout << '\n';
    return OkStatus();
  }

 private:
  std::string model_dir_, text_, file_;
  CLI::Option* text_option_;
  EncodeOptions options_;
  bool json_ = false;
};

class DetokenizeCommand : public Command {
 public:
  explicit DetokenizeCommand(CLI::App& app) {
    app.add_option("--model", model_dir_, "directory with tokenizer.json")->required()->option_text("DIR");
    app.add_option("--ids", ids_text_, "token ids, separated by commas")->required()->option_text("1,2,3");
    app.add_flag("--skip-special", skip_special_, "leave special tokens out");
    app.add_flag("--json", json_, "print {\"text\":..}; bytes that are not UTF-8 become U+FFFD");
  }

  Status CheckUsage() override {
    Result<std::vector<std::int32_t>> ids = ParseIdList(ids_text_);
    if (!ids.ok()) return ids.status().WithContext("--ids");
    ids_ = std::move(ids).value();
    return OkStatus();
  }

  Status Run() override {
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Open(model_dir_));
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      if (!tokenizer->HasId(ids_[i])) {
        return InvalidArgument("--ids[" + std::to_string(i) + "] = " + std::to_string(ids_[i]) + " is not a token of " +
                               model_dir_);
      }
    }
    const std::string text = tokenizer->Decode(ids_, skip_special_);
    if (json_) {
      PrintJson({{"text", ReplaceInvalidUtf8(text)}});
      return OkStatus();
    }
    std::cout << text;  // the exact bytes, so that a file gets back what was tokenised
    if (isatty(STDOUT_FILENO) == 1) std::cout << '\n';
    return OkStatus();
  }

 private:
  std::string model_dir_, ids_text_;
  std::vector<std::int32_t> ids_;
  bool skip_special_ = false;
  bool json_ = false;
};

}  // namespace

CommandEntry AddTokenizeCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("tokenize", "Text to token ids");
  return {app, std::make_unique<TokenizeCommand>(*app)};
}

CommandEntry AddDetokenizeCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("detokenize", "Token ids to text");
  return {app, std::make_unique<DetokenizeCommand>(*app)};
}

}  // namespace zeroc
