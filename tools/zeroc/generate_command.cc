// zeroc generate: a completion on this machine, in this process.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>

#include "libzeroc/engine/local_generator.h"
#include "libzeroc/tokenizer/stop_matcher.h"
#include "libzeroc/tokenizer/streaming_decoder.h"
#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/session.h"
#include "tools/zeroc/text_input.h"

namespace zeroc {
namespace {

class GenerateCommand : public Command {
 public:
  explicit GenerateCommand(CLI::App& app) {
    options_.AddModel(app);
    auto* source = app.add_option_group("source");
    prompt_option_ = source->add_option("--prompt", prompt_, "the prompt; BOS is put in front as the tokenizer has it")
                         ->option_text("TEXT");
    source->add_option("--prompt-file", prompt_file_, "file with the prompt, taken as bytes")->option_text("FILE");
    source
        ->add_option("--ids-file", ids_file_,
                     "JSON array of ids, or an object with \"ids\"; taken as they are, no BOS added")
        ->option_text("FILE");
    source->require_option(1);
    app.add_option("--max-tokens", sampling_.max_tokens, "tokens to generate at most [128]")
        ->check(CLI::Range(1, std::numeric_limits<int>::max()))
        ->option_text("N");
    AddSampling(app);
    app.add_option("--stop", stops_, "text that ends the completion and is cut off; may be repeated")
        ->option_text("TEXT ..");
    app.add_flag("--ignore-eos", sampling_.ignore_eos, "go on behind the end-of-text token");
    options_.AddProfile(app);
    options_.AddMethod(app);
    options_.AddBackend(app);
    options_.AddThreads(app);
    options_.AddJson(app);
  }

  Status CheckUsage() override {
    ZEROC_RETURN_IF_ERROR(options_.CheckUsage());
    if (std::find(stops_.begin(), stops_.end(), "") != stops_.end()) return InvalidArgument("--stop must not be empty");
    return sampling_.Validate(std::numeric_limits<std::int32_t>::max());
  }

  Status Run() override {
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(options_));
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, session->OpenTokenizer());
    ZEROC_ASSIGN_OR_RETURN(const std::vector<std::int32_t> prompt, Prompt(*session, *tokenizer));
    ZEROC_ASSIGN_OR_RETURN(const ScoredMethod method, session->Asked());

    StreamingDecoder decoder(*tokenizer, /*skip_special=*/true);
    StopMatcher matcher(stops_);
    std::string text;
    bool stopped = false;
    const auto show = [&](const std::string& piece) {
      text += piece;
      if (!options_.json) std::cout << piece << std::flush;
    };
    const auto match = [&](const std::string& piece) {
      if (stopped) return;
      const StopMatcher::Output output = matcher.Push(piece);
      stopped = output.stopped;
      show(output.text);
    };
    const TokenFn on_token = [&](const SampledToken& token) {
      match(decoder.Push(token.id));
      return !stopped;
    };
    ZEROC_ASSIGN_OR_RETURN(const Completion completion,
                           method.attention != nullptr
                               ? GenerateLocally(*method.model, *method.attention, prompt, sampling_, on_token)
                               : GenerateLocally(*method.model, method.format, prompt, sampling_, on_token));
    match(decoder.Flush());
    if (!stopped) show(matcher.Flush());
    Print(completion, prompt.size(), text);
    return OkStatus();
  }

 private:
  void AddSampling(CLI::App& app) {
    SamplingParams& s = sampling_;
    s.max_tokens = 128;
    s.temperature = 0;
    app.add_option("--temperature", s.temperature, "0 to 2; 0: always the most likely token [0]")->option_text("X");
    app.add_option("--top-p", s.top_p, "smallest set of tokens with this probability, above 0 to 1 [1]")
        ->option_text("X");
    app.add_option("--top-k", s.top_k, "only the N most likely tokens; 0: all [0]")->option_text("N");
    app.add_option("--min-p", s.min_p, "only tokens at least X times as likely as the best, 0 to 1 [0]")
        ->option_text("X");
    app.add_option("--seed", s.seed, "of the random draws; equal seeds give equal texts [0]")->option_text("N");
    app.add_option("--repetition-penalty", s.repetition_penalty,
                   "divides positive and multiplies negative logits of tokens seen, above 0 to 2 [1]")
        ->option_text("X");
    app.add_option("--presence-penalty", s.presence_penalty, "taken off the logits of generated tokens, -2 to 2 [0]")
        ->option_text("X");
    app.add_option("--frequency-penalty", s.frequency_penalty, "the same for each time it was generated, -2 to 2 [0]")
        ->option_text("X");
  }

  Result<std::vector<std::int32_t>> Prompt(const Session& session, const Tokenizer& tokenizer) {
    if (!ids_file_.empty()) {
      ZEROC_ASSIGN_OR_RETURN(std::vector<std::int32_t> ids, ReadIdsFile(ids_file_));
      ZEROC_RETURN_IF_ERROR(session.CheckIds(ids, ids_file_));
      return ids;
    }
    if (prompt_option_->count() == 0) {
      ZEROC_ASSIGN_OR_RETURN(prompt_, ReadFile(prompt_file_));
    }
    return tokenizer.EncodePrompt(prompt_);
  }

  void Print(const Completion& completion, std::size_t n_prompt, const std::string& text) const {
    const char* reason = completion.reason == FinishReason::kStop ? "stop" : "length";
    if (options_.json) {
      PrintJson({{"text", text},
                 {"ids", completion.ids},
                 {"finish_reason", reason},
                 {"kv_bytes_per_token", completion.kv_bytes_per_token}});
      return;
    }
    std::cout << std::endl;
    std::cerr << "[" << n_prompt << " prompt tokens, " << completion.ids.size() << " generated, finished by " << reason
              << ", " << Fixed(completion.kv_bytes_per_token, 1) << " KV bytes per token]" << std::endl;
  }

  ModelOptions options_;
  SamplingParams sampling_;
  std::string prompt_, prompt_file_, ids_file_;
  CLI::Option* prompt_option_;
  std::vector<std::string> stops_;
};

}  // namespace

CommandEntry AddGenerateCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("generate", "Complete a prompt");
  return {app, std::make_unique<GenerateCommand>(*app)};
}

}  // namespace zeroc
