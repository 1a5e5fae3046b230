// zeroc bench: what the engine reaches on this machine, and what share of the machine that is.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

#include "libzeroc/kv/owned_pool.h"
#include "tools/zeroc/command.h"
#include "tools/zeroc/machine_probe.h"
#include "tools/zeroc/model_cost.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/session.h"

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kChunkTokens = 512;
constexpr int kStepsPerRun = 16;  // decode steps timed together
constexpr int kWarmUpSteps = 4;

struct TimedRun {
  double seconds = 0;
  double tokens = 0;
  double flops = 0;
  double bytes = 0;
};

// The caches of the batch. Members end in reverse order: sequences before their pool.
class Caches {
 public:
  Status Create(const ScoredMethod& method, int n_sequences, int max_tokens, int step_tokens_max) {
    format_ = method.format;
    max_tokens_ = max_tokens;
    step_tokens_max_ = step_tokens_max;
    ZEROC_ASSIGN_OR_RETURN(
        pool_, OwnedPool::Create(*format_, n_sequences, max_tokens, step_tokens_max, method.model->kv_memory()));
    sequences_.resize(static_cast<std::size_t>(n_sequences));
    return Reset();
  }

  // Empties every sequence. The memory stays, so that a repeated run meets no page faults.
  Status Reset() {
    for (auto& sequence : sequences_) sequence.reset();
    for (auto& sequence : sequences_) {
      ZEROC_ASSIGN_OR_RETURN(sequence, SequenceKv::Create(pool_->pool(), format_, max_tokens_, step_tokens_max_));
    }
    return OkStatus();
  }

  SequenceKv& kv(int i) { return *sequences_[static_cast<std::size_t>(i)]; }

 private:
  std::shared_ptr<const KvFormat> format_;
  int max_tokens_ = 0;
  int step_tokens_max_ = 0;
  std::unique_ptr<OwnedPool> pool_;
  std::vector<std::unique_ptr<SequenceKv>> sequences_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Ids spread over the vocabulary, the same every time: throughput does not depend on which they are.
std::vector<std::int32_t> MakeIds(int n, std::int64_t vocab_size) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  std::uint64_t state = 1;
  for (std::int32_t& id : ids) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;  // Knuth's MMIX generator
    id = static_cast<std::int32_t>((state >> 33) % static_cast<std::uint64_t>(vocab_size));
  }
  return ids;
}

class BenchCommand : public Command {
 public:
  explicit BenchCommand(CLI::App& app) {
    app.add_option("what", what_,
                   "prefill: prompts of --prompt-tokens; decode: steps of --batch sequences behind --context tokens")
        ->required()
        ->check(CLI::IsMember({"prefill", "decode"}))
        ->option_text("prefill|decode");
    options_.AddModel(app);
    app.add_option("--prompt-tokens", n_prompt_, "prefill: tokens of a prompt [2048]")
        ->check(CLI::Range(1, 1 << 20))
        ->option_text("N");
    app.add_option("--context", n_context_, "decode: tokens in front of the first step [2048]")
        ->check(CLI::Range(1, 1 << 20))
        ->option_text("N");
    app.add_option("--batch", batch_, "sequences computed together [1]")->check(CLI::Range(1, 4096))->option_text("B");
    app.add_option("--repeat", n_runs_, "timed runs, whose median counts: prompts, or 16 decode steps each [5]")
        ->check(CLI::Range(1, 1000))
        ->option_text("R");
    options_.AddProfile(app);
    options_.AddMethod(app);
    options_.AddBackend(app);
    options_.AddThreads(app);
    options_.AddJson(app);
    app.footer(
        "FLOP/s and bytes/s count what the model's shape asks for: matrix products and attention; weights and KV, once "
        "per pass. The fractions are of the peaks measured in the same run: multiply-adds in registers, and reads of "
        "512 MiB of memory. A model that fits the caches may read faster than memory.");
  }

  Status CheckUsage() override { return options_.CheckUsage(); }

  Status Run() override {
    ZEROC_RETURN_IF_ERROR(options_.RefuseBaselines("bench"));
    if (options_.backend == "cuda") {
      return Unimplemented(
          "zeroc bench sets its figures beside the processors' peak; on a GPU: tests/gpu/run --part bench");
    }
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(options_));
    ZEROC_ASSIGN_OR_RETURN(const ScoredMethod method, session->Asked());
    Progress progress;
    progress_ = &progress;
    progress.Show("machine peak", 0);
    peak_ = MeasureMachinePeak(session->threads().size());
    ZEROC_RETURN_IF_ERROR(what_ == "prefill" ? BenchPrefill(method) : BenchDecode(method));
    Print(*session, method);
    return OkStatus();
  }

 private:
  using Ids = std::vector<std::int32_t>;

  // One pass of the same new tokens for every sequence; adds its cost to *run.
  Status Pass(const ScoredMethod& method, Caches& caches, std::span<const std::int32_t> ids, int n_logits,
              TimedRun* run) {
    std::vector<ForwardSequence> sequences;
    sequences.reserve(static_cast<std::size_t>(batch_));
    for (int i = 0; i < batch_; ++i) sequences.push_back({&caches.kv(i), ids, n_logits});
    const ModelConfig& config = method.model->config();
    logits_.resize(static_cast<std::size_t>(batch_) * static_cast<std::size_t>(config.vocab_size));
    const PassCost cost = CostOfPass(config, caches.kv(0).n_tokens(), static_cast<std::int64_t>(ids.size()), n_logits);
    const Clock::time_point start = Clock::now();
    ZEROC_RETURN_IF_ERROR(method.model->Forward(sequences, logits_.data()));
    run->seconds += std::chrono::duration<double>(Clock::now() - start).count();
    run->tokens += static_cast<double>(ids.size()) * batch_;
    run->flops += cost.flops * batch_;
    run->bytes += cost.bytes + static_cast<double>(caches.kv(0).HeldBytes()) * batch_;
    return OkStatus();
  }

  Status Prefill(const ScoredMethod& method, Caches& caches, const Ids& ids, TimedRun* run) {
    const std::span<const std::int32_t> all = ids;
    for (std::size_t begin = 0; begin < ids.size(); begin += kChunkTokens) {
      const std::size_t n = std::min<std::size_t>(kChunkTokens, ids.size() - begin);
      ZEROC_RETURN_IF_ERROR(Pass(method, caches, all.subspan(begin, n), begin + n == ids.size() ? 1 : 0, run));
    }
    return OkStatus();
  }

  Status BenchPrefill(const ScoredMethod& method) {
    Caches caches;
    ZEROC_RETURN_IF_ERROR(caches.Create(method, batch_, n_prompt_, std::min(kChunkTokens, n_prompt_)));
    const Ids ids = MakeIds(n_prompt_, method.model->config().vocab_size);
    for (int i = -1; i < n_runs_; ++i) {  // the first one only warms up
      progress_->Show("prefill", static_cast<double>(i + 1) / (n_runs_ + 1));
      ZEROC_RETURN_IF_ERROR(caches.Reset());
      TimedRun run;
      ZEROC_RETURN_IF_ERROR(Prefill(method, caches, ids, &run));
      if (i >= 0) runs_.push_back(run);
    }
    kv_bytes_per_token_ = static_cast<double>(caches.kv(0).HeldBytes()) / n_prompt_;
    return OkStatus();
  }

  Status BenchDecode(const ScoredMethod& method) {
    const int n_tokens = n_context_ + kWarmUpSteps + n_runs_ * kStepsPerRun;
    Caches caches;
    ZEROC_RETURN_IF_ERROR(caches.Create(method, batch_, n_tokens, std::min(kChunkTokens, n_context_)));
    const Ids ids = MakeIds(n_tokens, method.model->config().vocab_size);
    progress_->Show("context", 0);
    TimedRun untimed;
    ZEROC_RETURN_IF_ERROR(Prefill(method, caches, Ids(ids.begin(), ids.begin() + n_context_), &untimed));
    const std::span<const std::int32_t> all = ids;
    const auto step = [&](TimedRun* run) {
      return Pass(method, caches, all.subspan(static_cast<std::size_t>(caches.kv(0).n_tokens()), 1), 1, run);
    };
    for (int i = 0; i < kWarmUpSteps; ++i) ZEROC_RETURN_IF_ERROR(step(&untimed));
    for (int i = 0; i < n_runs_; ++i) {
      progress_->Show("decode", static_cast<double>(i) / n_runs_);
      TimedRun run;
      for (int j = 0; j < kStepsPerRun; ++j) ZEROC_RETURN_IF_ERROR(step(&run));
      runs_.push_back(run);
    }
    kv_bytes_per_token_ = static_cast<double>(caches.kv(0).HeldBytes()) / caches.kv(0).n_tokens();
    return OkStatus();
  }

  std::vector<double> Rates(double TimedRun::*amount) const {
    std::vector<double> rates;
    for (const TimedRun& run : runs_) rates.push_back(run.*amount / run.seconds);
    return rates;
  }

  void Print(Session& session, const ScoredMethod& method) const {
    const std::vector<double> tokens = Rates(&TimedRun::tokens);
    const double flops = Median(Rates(&TimedRun::flops));
    const double bytes = Median(Rates(&TimedRun::bytes));
    const auto [slowest, fastest] = std::minmax_element(tokens.begin(), tokens.end());
    const int n_tokens = what_ == "prefill" ? n_prompt_ : n_context_;
    if (options_.json) {
      PrintJson({{"bench", what_},
                 {"profile", method.format->profile},
                 {what_ == "prefill" ? "prompt_tokens" : "context", n_tokens},
                 {"batch", batch_},
                 {"threads", session.threads().size()},
                 {"backend", session.ops().name},
                 {"isa", session.ops().isa()},
                 {"processor", peak_.processor},
                 {"repeat", n_runs_},
                 {"tokens_per_s", Median(tokens)},
                 {"tokens_per_s_min", *slowest},
                 {"tokens_per_s_max", *fastest},
                 {"flops_per_s", flops},
                 {"flops_fraction", flops / peak_.flops_per_s},
                 {"bytes_per_s", bytes},
                 {"bytes_fraction", bytes / peak_.read_bytes_per_s},
                 {"peak_flops_per_s", peak_.flops_per_s},
                 {"peak_flops_kind", peak_.flops_kind},
                 {"peak_read_bytes_per_s", peak_.read_bytes_per_s},
                 {"kv_bytes_per_token", kv_bytes_per_token_}});
      return;
    }
    std::cout << what_ << " of " << batch_ << " x " << n_tokens << " tokens, profile " << method.format->profile << ", "
              << session.threads().size() << " threads, backend " << session.ops().name << " (" << session.ops().isa()
              << "), " << peak_.processor << "\n\n";
    Table table({"", "median", "of the machine's peak", "peak"});
    table.Add({"tokens/s", Fixed(Median(tokens), 1)});
    table.Add({"matrix products, attention", WithPrefix(flops, "FLOP/s"),
               Fixed(100 * flops / peak_.flops_per_s, 1) + " %",
               WithPrefix(peak_.flops_per_s, "FLOP/s ") + peak_.flops_kind});
    table.Add({"weights and KV read", WithPrefix(bytes, "B/s"), Fixed(100 * bytes / peak_.read_bytes_per_s, 1) + " %",
               WithPrefix(peak_.read_bytes_per_s, "B/s memory read")});
    std::cout << table.ToString() << "\nspread of " << n_runs_ << " runs: " << Fixed(*slowest, 1) << " to "
              << Fixed(*fastest, 1) << " tokens/s; " << Fixed(kv_bytes_per_token_, 1) << " KV bytes per token\n";
  }

  ModelOptions options_;
  std::string what_;
  int n_prompt_ = 2048;
  int n_context_ = 2048;
  int batch_ = 1;
  int n_runs_ = 5;
  Progress* progress_ = nullptr;
  MachinePeak peak_;
  std::vector<TimedRun> runs_;
  std::vector<float> logits_;
  double kv_bytes_per_token_ = 0;
};

}  // namespace

CommandEntry AddBenchCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("bench", "Throughput of the engine, beside what this machine can do");
  return {app, std::make_unique<BenchCommand>(*app)};
}

}  // namespace zeroc
