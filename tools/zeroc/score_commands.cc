// zeroc perplexity, zeroc recall.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>

#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/recall_cases.h"
#include "tools/zeroc/session.h"
#include "tools/zeroc/text_input.h"

namespace zeroc {
namespace {

constexpr const char* kTextHelp =
    "file with the text; FILE@A:B takes the part from A to B percent of its bytes, e.g. FILE@50:100";

ProgressFn Bar(Progress& progress, const char* stage) {
  return [&progress, stage](double done) {
    progress.Show(stage, done);
    return true;
  };
}

std::string MethodName(const ModelOptions& options) {
  if (options.baseline()) return options.method;
  return options.compressed() ? "zeroc, profile " + options.profile : "none (original weights, bf16 KV)";
}

class PerplexityCommand : public Command {
 public:
  explicit PerplexityCommand(CLI::App& app) {
    options_.AddModel(app);
    app.add_option("--text", text_, kTextHelp)->required()->option_text("FILE");
    app.add_option("--context", score_.context, "tokens per window, BOS included [2048]")
        ->check(CLI::Range(2, 1 << 24))
        ->option_text("C");
    app.add_option("--stride", score_.stride, "tokens scored at the end of each window, below the context [1024]")
        ->check(CLI::Range(1, 1 << 24))
        ->option_text("S");
    app.add_option("--max-windows", score_.max_windows, "windows scored, from the start of the text; 0: all [0]")
        ->check(CLI::Range(0, std::numeric_limits<int>::max()))
        ->option_text("N");
    app.add_option("--score", path_,
                   "decode: scored tokens run one by one, packed as they go; prefill: in chunks, faster [decode]")
        ->check(CLI::IsMember({"decode", "prefill"}))
        ->option_text("PATH");
    app.add_option("--tokens-out", tokens_out_,
                   "also write one line per scored token: nats, and nats of KL divergence; for paired tests")
        ->option_text("FILE");
    app.add_option("--kl-base", score_.base_logits_file,
                   "keep the uncompressed model's logits here (4 bytes per scored token and vocabulary entry), or take "
                   "them from here: several profiles on one text compute them once")
        ->option_text("FILE");
    options_.AddProfile(app);
    options_.AddMethod(app);
    options_.AddBackend(app);
    options_.AddThreads(app);
    options_.AddJson(app);
  }

  Status CheckUsage() override {
    if (score_.stride >= score_.context) return InvalidArgument("--stride must be below --context");
    ZEROC_ASSIGN_OR_RETURN(slice_, ParseTextSlice(text_));
    return options_.CheckUsage();
  }

  Status Run() override {
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(options_));
    ZEROC_ASSIGN_OR_RETURN(const std::string text, ReadTextSlice(slice_));
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, session->OpenTokenizer());
    ZEROC_ASSIGN_OR_RETURN(const std::vector<std::int32_t> tokens, tokenizer->Encode(text));
    ZEROC_RETURN_IF_ERROR(session->CheckIds(tokens, "tokens of " + text_));
    ZEROC_ASSIGN_OR_RETURN(const std::int32_t bos_id, session->BosId(*tokenizer));
    ZEROC_ASSIGN_OR_RETURN(const ScoredMethod base, session->Uncompressed());
    Progress progress;
    std::vector<ScoredMethod> methods;
    if (options_.compressed()) {
      ZEROC_ASSIGN_OR_RETURN(ScoredMethod asked, session->Asked(Bar(progress, "calibration")));
      methods.push_back(std::move(asked));
    }
    score_.through_decode = path_ == "decode";
    ZEROC_ASSIGN_OR_RETURN(
        const std::vector<TextScore> scores,
        ScoreText(tokens, TokenBytes(*tokenizer, tokens), bos_id, base, methods, score_, Bar(progress, "perplexity")));
    if (!tokens_out_.empty()) ZEROC_RETURN_IF_ERROR(WriteTokens(scores.back()));
    Print(scores.front(), scores.back());
    return OkStatus();
  }

 private:
  Status WriteTokens(const TextScore& score) const {
    std::ofstream file(tokens_out_, std::ios::binary | std::ios::trunc);
    char line[64];
    for (std::size_t i = 0; i < score.token_nll.size(); ++i) {
      std::snprintf(line, sizeof line, "%.9g %.9g\n", score.token_nll[i], score.token_kl[i]);
      file << line;
    }
    file.close();
    if (!file) return NotFound("--tokens-out " + tokens_out_ + ": cannot be written");
    return OkStatus();
  }

  void Print(const TextScore& base, const TextScore& score) const {
    if (options_.json) {
      PrintJson({{"ppl", score.ppl},
                 {"nll", score.nll},
                 {"tokens", score.tokens},
                 {"bits_per_byte", score.bits_per_byte},
                 {"kl", score.kl},
                 {"kv_bytes_per_token", score.kv_bytes_per_token}});
      return;
    }
    Table table({"method", MethodName(options_)});
    table.Add({"perplexity", Fixed(score.ppl, 4)});
    if (options_.compressed()) {
      table.Add({"perplexity without compression", Fixed(base.ppl, 4)});
      table.Add({"KL divergence from it, nats/token", Fixed(score.kl, 6)});
    }
    table.Add({"nats/token", Fixed(score.nll, 5)});
    table.Add({"bits/byte", Fixed(score.bits_per_byte, 4)});
    table.Add({"tokens scored", std::to_string(score.tokens)});
    table.Add({"KV bytes/token at window end", Fixed(score.kv_bytes_per_token, 1)});
    std::cout << table.ToString();
  }

  ModelOptions options_;
  ScoreOptions score_;
  std::string text_, tokens_out_, path_ = "decode";
  TextSlice slice_;
};

class RecallCommand : public Command {
 public:
  explicit RecallCommand(CLI::App& app) {
    options_.AddModel(app);
    app.add_option("--set", set_,
                   "cases, one JSON object per line: prompt, answer (the exact continuation), group or distance")
        ->required()
        ->option_text("FILE");
    app.add_option("--max-cases", n_cases_max_, "cases taken, evenly over the groups; 0: all [0]")
        ->check(CLI::Range(0, std::numeric_limits<int>::max()))
        ->option_text("N");
    options_.AddProfile(app);
    options_.AddMethod(app);
    options_.AddBackend(app);
    options_.AddThreads(app);
    options_.AddJson(app);
  }

  Status CheckUsage() override { return options_.CheckUsage(); }

  Status Run() override {
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(options_));
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, session->OpenTokenizer());
    ZEROC_ASSIGN_OR_RETURN(const std::vector<RecallCase> cases,
                           LoadRecallCases(*session, *tokenizer, set_, n_cases_max_));
    Progress progress;
    ZEROC_ASSIGN_OR_RETURN(const ScoredMethod method, session->Asked(Bar(progress, "calibration")));
    ZEROC_ASSIGN_OR_RETURN(const RecallScore score, ScoreRecall(cases, method, Bar(progress, "recall")));
    Print(score, cases.size());
    return OkStatus();
  }

 private:
  void Print(const RecallScore& score, std::size_t n_cases) const {
    if (options_.json) {
      nlohmann::ordered_json groups = nlohmann::ordered_json::object();
      for (const auto& [name, accuracy] : score.by_group) groups[name] = accuracy;
      PrintJson({{"accuracy", score.accuracy},
                 {"by_group", std::move(groups)},
                 {"kv_bytes_per_token", score.kv_bytes_per_token}});
      return;
    }
    Table table({"method", MethodName(options_)});
    table.Add({"cases", std::to_string(n_cases)});
    table.Add({"answered exactly", Fixed(score.accuracy, 4)});
    for (const auto& [name, accuracy] : score.by_group) table.Add({"  group " + name, Fixed(accuracy, 4)});
    table.Add({"KV bytes/token behind the prompt", Fixed(score.kv_bytes_per_token, 1)});
    std::cout << table.ToString();
  }

  ModelOptions options_;
  std::string set_;
  int n_cases_max_ = 0;
};

}  // namespace

CommandEntry AddPerplexityCommand(CLI::App& parent) {
  CLI::App* app =
      parent.add_subcommand("perplexity", "Decode-scored perplexity of a text, with and without compression");
  return {app, std::make_unique<PerplexityCommand>(*app)};
}

CommandEntry AddRecallCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("recall", "Share of planted facts that the model repeats exactly (greedy)");
  return {app, std::make_unique<RecallCommand>(*app)};
}

}  // namespace zeroc
