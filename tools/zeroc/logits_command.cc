// zeroc logits: next-token distributions at chosen positions of a list of ids.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "libzeroc/kv/owned_pool.h"
#include "tools/zeroc/command.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/session.h"
#include "tools/zeroc/text_input.h"

namespace zeroc {
namespace {

// Logits of one forward pass held at once: 64 MiB, whatever the vocabulary.
constexpr std::int64_t kLogitsMax = std::int64_t{16} << 20;
constexpr int kChunkTokens = 512;

struct Distribution {
  double logsumexp = 0;
  std::vector<std::pair<std::int32_t, float>> top;  // best first, lower id first among equals
};

Distribution Summarise(std::span<const float> logits, int n_top) {
  Distribution result;
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max);
  result.logsumexp = max + std::log(sum);
  std::vector<std::int32_t> ids(logits.size());
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
  const auto n = static_cast<std::ptrdiff_t>(std::min<std::size_t>(static_cast<std::size_t>(n_top), ids.size()));
  std::partial_sort(ids.begin(), ids.begin() + n, ids.end(), [logits](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)];
    const float y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    const std::int32_t id = ids[static_cast<std::size_t>(i)];
    result.top.emplace_back(id, logits[static_cast<std::size_t>(id)]);
  }
  return result;
}

class LogitsCommand : public Command {
 public:
  explicit LogitsCommand(CLI::App& app) {
    options_.AddModel(app);
    app.add_option("--ids-file", ids_file_,
                   "JSON array of token ids, or an object with \"ids\"; taken as they are, no BOS added")
        ->required()
        ->option_text("FILE");
    app.add_option("--positions", positions_text_,
                   "last, all, or positions from 0, e.g. 0,15,99: the logits there predict the next token [last]")
        ->option_text("WHICH");
    app.add_option("--top", n_top_, "tokens listed per position, best first [20]")
        ->check(CLI::Range(1, 1 << 24))
        ->option_text("N");
    options_.AddProfile(app);
    options_.AddMethod(app);
    options_.AddBackend(app);
    options_.AddThreads(app);
    options_.AddJson(app);
  }

  Status CheckUsage() override {
    ZEROC_RETURN_IF_ERROR(options_.CheckUsage());
    if (positions_text_ == "last" || positions_text_ == "all") return OkStatus();
    Result<std::vector<std::int32_t>> positions = ParseIdList(positions_text_);
    if (!positions.ok()) return positions.status().WithContext("--positions");
    if (positions->empty()) return InvalidArgument("--positions names no position");
    positions_ = std::move(positions).value();
    return OkStatus();
  }

  Status Run() override {
    ZEROC_RETURN_IF_ERROR(options_.RefuseBaselines("logits"));
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(options_));
    ZEROC_ASSIGN_OR_RETURN(const std::vector<std::int32_t> ids, ReadIdsFile(ids_file_));
    ZEROC_RETURN_IF_ERROR(session->CheckIds(ids, ids_file_));
    const ModelConfig& config = session->checkpoint().config();
    if (static_cast<std::int64_t>(ids.size()) > config.max_positions) {
      return InvalidArgument(ids_file_ + ": " + std::to_string(ids.size()) + " ids, the model takes at most " +
                             std::to_string(config.max_positions));
    }
    ZEROC_RETURN_IF_ERROR(ChoosePositions(static_cast<std::int32_t>(ids.size())));
    ZEROC_ASSIGN_OR_RETURN(const ScoredMethod method, session->Asked());
    ZEROC_RETURN_IF_ERROR(Compute(method, ids));
    Print();
    return OkStatus();
  }

 private:
  Status ChoosePositions(std::int32_t n_ids) {
    if (positions_text_ == "last") positions_ = {n_ids - 1};
    if (positions_text_ == "all") {
      positions_.resize(static_cast<std::size_t>(n_ids));
      for (std::int32_t i = 0; i < n_ids; ++i) positions_[static_cast<std::size_t>(i)] = i;
    }
    for (const std::int32_t position : positions_) {
      if (position >= n_ids) {
        return InvalidArgument("--positions " + std::to_string(position) + " is beyond the " + std::to_string(n_ids) +
                               " ids of " + ids_file_);
      }
    }
    return OkStatus();
  }

  // Runs the ids in chunks. Logits come for the last tokens of a chunk, so a chunk ends soon after its first wanted
  // position, and rows that nobody asked for are dropped.
  Status Compute(const ScoredMethod& method, std::span<const std::int32_t> ids) {
    const auto vocab = static_cast<std::size_t>(method.model->config().vocab_size);
    const int n_rows_max =
        static_cast<int>(std::clamp<std::int64_t>(kLogitsMax / static_cast<std::int64_t>(vocab), 1, 256));
    const std::set<std::int32_t> wanted(positions_.begin(), positions_.end());
    const int n_tokens = *wanted.rbegin() + 1;  // what lies behind the last wanted position is not needed
    const int chunk_max = std::min(kChunkTokens, n_tokens);
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<OwnedPool> pool,
                           OwnedPool::Create(*method.format, 1, n_tokens, chunk_max, method.model->kv_memory()));
    ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<SequenceKv> kv,
                           SequenceKv::Create(pool->pool(), method.format, n_tokens, chunk_max));
    std::vector<float> logits;
    Progress progress;
    for (int begin = 0; begin < n_tokens;) {
      int end = std::min(begin + chunk_max, n_tokens);
      const auto first = wanted.lower_bound(begin);  // exists: the last wanted position is not yet done
      end = std::min(end, *first + n_rows_max);
      const int n_rows = std::max(end - *first, 0);
      logits.resize(std::max(logits.size(), static_cast<std::size_t>(n_rows) * vocab));
      const ForwardSequence step{
          kv.get(), ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)), n_rows};
      ZEROC_RETURN_IF_ERROR(method.model->Forward({&step, 1}, logits.data()));
      for (auto at = first; at != wanted.end() && *at < end; ++at) {
        const float* row = logits.data() + static_cast<std::size_t>(*at - *first) * vocab;
        results_[*at] = Summarise({row, vocab}, n_top_);
      }
      begin = end;
      progress.Show("logits", static_cast<double>(begin) / n_tokens);
    }
    return OkStatus();
  }

  void Print() const {
    if (options_.json) {
      nlohmann::ordered_json list = nlohmann::ordered_json::array();
      for (const std::int32_t position : positions_) {
        const Distribution& d = results_.at(position);
        nlohmann::ordered_json top = nlohmann::ordered_json::array();
        for (const auto& [id, logit] : d.top) top.push_back(nlohmann::ordered_json::array({id, logit}));
        list.push_back({{"pos", position}, {"logsumexp", d.logsumexp}, {"top", std::move(top)}});
      }
      PrintJson({{"positions", std::move(list)}});
      return;
    }
    for (const std::int32_t position : positions_) {
      const Distribution& d = results_.at(position);
      std::cout << "position " << position << ", logsumexp " << Fixed(d.logsumexp, 6) << '\n';
      Table table({"  id", "logit", "probability"});
      for (const auto& [id, logit] : d.top) {
        table.Add({"  " + std::to_string(id), Fixed(logit, 6), Fixed(std::exp(logit - d.logsumexp), 6)});
      }
      std::cout << table.ToString();
    }
  }

  ModelOptions options_;
  std::string ids_file_;
  std::string positions_text_ = "last";
  int n_top_ = 20;
  std::vector<std::int32_t> positions_;  // in the order asked for
  std::map<std::int32_t, Distribution> results_;
};

}  // namespace

CommandEntry AddLogitsCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("logits", "Next-token logits of a list of ids");
  return {app, std::make_unique<LogitsCommand>(*app)};
}

}  // namespace zeroc
