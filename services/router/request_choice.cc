// What a flow chooses before it asks a worker: tokens, profile, workers, and whether decode prefills itself.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "services/common/logging.h"
#include "services/router/prefix_match.h"
#include "services/router/request_flow.h"

namespace zeroc {
namespace {

// Of larger pools the policy looks at the least loaded ones.
constexpr std::size_t kCandidatesMax = 16;

std::uint64_t FreshSeed() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

std::uint64_t PrefillTokens(const WorkerPool::View& view) {
  return std::max<std::uint64_t>(view.load.waiting_tokens(), view.assigned_tokens);
}

void KeepLeastLoaded(v1::WorkerRole role, std::vector<WorkerPool::View>* views) {
  if (views->size() <= kCandidatesMax) return;
  std::sort(views->begin(), views->end(), [role](const WorkerPool::View& x, const WorkerPool::View& y) {
    if (role == v1::WORKER_ROLE_DECODE) return x.load.kv_bytes_free() > y.load.kv_bytes_free();
    return PrefillTokens(x) < PrefillTokens(y);
  });
  views->resize(kCandidatesMax);
}

bool AnyHasPrefixes(const std::vector<WorkerPool::View>& prefills, const std::vector<WorkerPool::View>& decodes) {
  const auto has_some = [](const WorkerPool::View& view) { return !view.prefixes->empty(); };
  return std::any_of(prefills.begin(), prefills.end(), has_some) ||
         std::any_of(decodes.begin(), decodes.end(), has_some);
}

std::string Text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

}  // namespace

// Reads only constants, so it runs without the lock.
Result<RequestFlow::Choice> RequestFlow::Choose() const {
  const RequestLimits& limits = context_.config.limits;
  Choice choice;
  ZEROC_RETURN_IF_ERROR(CheckRequest(request_, limits));
  if (request_.has_text()) {
    ZEROC_ASSIGN_OR_RETURN(choice.prompt_ids, context_.model.codec->EncodePrompt(request_.text()));
  } else {
    choice.prompt_ids.assign(request_.token_ids().ids().begin(), request_.token_ids().ids().end());
  }
  ZEROC_ASSIGN_OR_RETURN(choice.sampling, ResolveSampling(request_, limits, choice.prompt_ids.size(), FreshSeed()));
  return choice;
}

WorkerPool::Choice RequestFlow::Wanted(Role role, std::uint64_t n_prompt, std::uint32_t max_tokens) const {
  WorkerPool::Choice wanted;
  wanted.n_tokens = role == Role::kPrefill ? n_prompt : n_prompt + max_tokens;
  wanted.avoided = role == Role::kPrefill ? avoided_prefill_ : avoided_decode_;
  if (role == Role::kDecode) wanted.excluded = round_.refused_by;
  return wanted;
}

// Long prompts; one that a prefill worker has failed already takes the simplest way.
bool RequestFlow::MayTakeAllRanks(std::uint64_t n_prompt) const {
  const std::uint32_t sp_min_tokens = context_.config.sp_min_tokens;
  return sp_min_tokens > 0 && n_prompt >= sp_min_tokens && avoided_prefill_.empty();
}

// Short prompts, and those that would wait longer for a prefill worker than decode needs; all when there is no prefill
// worker. Long ones would hold up what decode has in its batch.
bool RequestFlow::PrefillsLocally(std::uint64_t n_prompt, const std::vector<WorkerPool::View>& prefills) const {
  const FlowConfig& config = context_.config;
  if (config.local_prefill_tokens == 0) return false;
  if (n_prompt <= config.local_prefill_tokens || prefills.empty()) return true;
  if (n_prompt > config.local_prefill_tokens * config.local_prefill_overload_factor) return false;
  return std::all_of(prefills.begin(), prefills.end(), [&](const WorkerPool::View& view) {
    const std::optional<Line> seconds = context_.estimates.PrefillSeconds(view.name);
    if (!seconds.has_value()) return false;
    const double queue = seconds->slope * static_cast<double>(PrefillTokens(view));
    return queue > std::chrono::duration<double>(config.local_prefill_queue).count();
  });
}

// Once the client knows the profile, only the workers are chosen.
std::optional<std::string> RequestFlow::RequestedProfile() const {
  if (started_sent_) return rung_->name;
  return request_.kv().has_profile() ? std::optional(request_.kv().profile()) : std::nullopt;
}

// The policy's view of the workers.
Result<RequestFlow::Decision> RequestFlow::DecideNow(std::uint64_t n_prompt, std::uint32_t max_tokens) {
  Decision decision;
  auto prefills = context_.pool.Candidates(v1::WORKER_ROLE_PREFILL, Wanted(Role::kPrefill, n_prompt, max_tokens));
  auto decodes = context_.pool.Candidates(v1::WORKER_ROLE_DECODE, Wanted(Role::kDecode, n_prompt, max_tokens));
  KeepLeastLoaded(v1::WORKER_ROLE_PREFILL, &prefills);
  KeepLeastLoaded(v1::WORKER_ROLE_DECODE, &decodes);
  decision.local_prefill = PrefillsLocally(n_prompt, prefills);

  // What decode prefills itself it computes whole, into blocks of its own.
  std::optional<PromptPrefixes> prompt;
  if (!decision.local_prefill && AnyHasPrefixes(prefills, decodes)) {
    std::vector<std::uint32_t> ids = prompt_ids_;
    ids.insert(ids.end(), answer_.ids().begin(), answer_.ids().end());
    prompt.emplace(context_.model, ids, RequestedProfile());
  }
  const auto cached = [&](const WorkerPool::View& view) {
    return prompt.has_value() ? prompt->CachedTokens(view.prefixes.get()) : std::vector<std::uint32_t>();
  };

  const Estimates& estimates = context_.estimates;
  std::vector<PrefillView> prefill_views;
  std::vector<DecodeView> decode_views;
  std::vector<std::optional<LinkView>> links;
  for (const WorkerPool::View& view : decodes) {
    decode_views.push_back({view.name, view.load.kv_bytes_free(), view.kv_bytes_total,
                            estimates.TokenSeconds(view.name), estimates.RequestDecodeSeconds(view.name),
                            static_cast<std::uint32_t>(view.n_requests), cached(view)});
  }
  if (decision.local_prefill) {
    // Nothing travels; the prompt's compute is the same for every profile.
    prefill_views.push_back({"", 0, std::nullopt});
    for (const DecodeView& view : decode_views) {
      links.push_back(view.token_seconds.has_value() ? std::optional(LinkView()) : std::nullopt);
    }
  } else {
    decision.all_ranks = MayTakeAllRanks(n_prompt);  // unless time says otherwise
    const auto add = [&](const WorkerPool::View& view, std::uint32_t n_ranks, std::vector<std::uint32_t> n_cached) {
      prefill_views.push_back(
          {view.name, PrefillTokens(view), estimates.PrefillSeconds(view.name, n_ranks), std::move(n_cached), n_ranks});
      for (const DecodeView& decode : decode_views) links.push_back(estimates.Link(view.name, decode.name, n_ranks));
    };
    for (const WorkerPool::View& view : prefills) {
      // A group's prompts do not use the prefix cache.
      if (decision.all_ranks && view.load.sp_ranks() > 1) add(view, view.load.sp_ranks(), {});
      add(view, 1, cached(view));
    }
  }

  const std::vector<std::optional<double>> audited = context_.audit.Excess();
  PolicyInput input;
  input.audited = audited;
  input.ladder = context_.model.ladder;
  input.default_max_ppl_increase = context_.config.default_max_ppl_increase;
  input.requested_profile = RequestedProfile();
  if (request_.kv().has_max_ppl_increase()) input.max_ppl_increase = request_.kv().max_ppl_increase();
  input.n_prompt_tokens = static_cast<double>(n_prompt);
  input.n_output_tokens = estimates.ExpectedOutput(max_tokens);
  input.n_output_max = max_tokens;
  if (request_.has_ttft_slo_ms()) input.ttft_slo_seconds = request_.ttft_slo_ms() / 1000;
  if (request_.has_tpot_slo_ms()) input.tpot_slo_seconds = request_.tpot_slo_ms() / 1000;
  input.prefills = prefill_views;
  input.decodes = decode_views;
  if (context_.config.adaptive) input.links = links;
  ZEROC_ASSIGN_OR_RETURN(decision.policy, Decide(input));
  if (decision.local_prefill && !request_.kv().has_profile()) decision.policy.reason = "local_prefill";
  if (const auto p = decision.policy.prefill_idx; p.has_value()) {
    decision.prefill = prefill_views[*p].name;
    decision.all_ranks = prefill_views[*p].n_ranks > 1;
  }
  if (const auto d = decision.policy.decode_idx; d.has_value()) decision.decode = decode_views[*d].name;
  return decision;
}

// Fails when there is nobody to take it. Prefill is taken first, so that nothing is reserved when there is nobody to
// fill it.
Result<RequestFlow::AttemptPtr> RequestFlow::NewAttempt() {
  const auto n_streamed = static_cast<std::uint32_t>(answer_.ids().size());
  const v1::SamplingParams sampling = SamplingBehind(sampling_, n_streamed);
  const std::uint64_t n_prompt = prompt_ids_.size() + n_streamed;
  Result<Decision> decision = DecideNow(n_prompt, sampling.max_tokens());
  if (!decision.ok()) return decision.status();
  if (!started_sent_) {
    rung_ = &context_.model.ladder[decision->policy.rung_idx];
    reason_ = decision->policy.reason;
    budget_ = decision->policy.budget;
    predicted_ = decision->policy.predicted;
  }
  const PolicyDecision& policy = decision->policy;

  AttemptPlan plan;
  plan.request_id = id();
  plan.token_ids = prompt_ids_;
  plan.token_ids.insert(plan.token_ids.end(), answer_.ids().begin(), answer_.ids().end());
  plan.n_streamed = n_streamed;
  plan.sampling = sampling;
  plan.profile = rung_->name;
  plan.layout_hash = rung_->layout_hash;
  plan.plan_id = context_.model.plan_id;
  plan.model_fingerprint = context_.model.fingerprint;
  plan.priority = request_.priority();
  plan.local_prefill = decision->local_prefill;
  plan.deadline = deadline_;
  auto attempt = std::make_shared<Attempt>(++n_attempts_, std::move(plan), context_.timers);

  const auto choice = [&](Role role, const std::string& preferred) {
    WorkerPool::Choice wanted = Wanted(role, n_prompt, sampling.max_tokens());
    wanted.preferred = preferred;
    wanted.all_ranks = role == Role::kPrefill && decision->all_ranks;
    wanted.on_lost = [weak = weak_from_this(), weak_attempt = std::weak_ptr<Attempt>(attempt), role] {
      const auto self = weak.lock();
      if (const auto lost = weak_attempt.lock(); self != nullptr && lost != nullptr) self->OnWorkerLost(lost, role);
    };
    return wanted;
  };
  if (!decision->local_prefill) {
    ZEROC_ASSIGN_OR_RETURN(attempt->prefill_worker,
                           context_.pool.PickPrefill(choice(Role::kPrefill, decision->prefill)));
  }
  ZEROC_ASSIGN_OR_RETURN(attempt->decode_worker, context_.pool.PickDecode(choice(Role::kDecode, decision->decode)));
  if (attempt->prefill_worker.name() == decision->prefill)
    attempt->n_expected_at_prefill = policy.prefill_cached_tokens;
  if (attempt->decode_worker.name() == decision->decode) attempt->n_expected_at_decode = policy.decode_cached_tokens;
  return attempt;
}

// Once for every request that gets room.
void RequestFlow::SendStarted() {
  if (std::exchange(started_sent_, true)) return;
  if (is_client()) {
    context_.metrics.CountDecision(rung_->name, reason_);
    context_.metrics.SetPplIncrease("budget", budget_);
    context_.metrics.SetPplIncrease("predicted", rung_->ppl_increase);
    context_.metrics.AddPrefixExpected("prefill", attempt_->n_expected_at_prefill);
    context_.metrics.AddPrefixExpected("decode", attempt_->n_expected_at_decode);
  }
  std::string line = "policy request=" + id() + " profile=" + rung_->name + " reason=" + reason_ +
                     " budget=" + Text(budget_) + " ppl_increase=" + Text(rung_->ppl_increase);
  if (predicted_.has_value()) {
    line += " predicted_jct_s=" + Text(predicted_->jct()) + " queue_s=" + Text(predicted_->queue) +
            " prefill_s=" + Text(predicted_->prefill) + " wire_s=" + Text(predicted_->wire) +
            " decode_s=" + Text(predicted_->decode);
  }
  if (attempt_->n_expected_at_prefill + attempt_->n_expected_at_decode > 0) {
    line += " prefill_cached_tokens=" + std::to_string(attempt_->n_expected_at_prefill) +
            " decode_cached_tokens=" + std::to_string(attempt_->n_expected_at_decode);
  }
  LogInfo(line + " prefill_worker=" + attempt_->prefill_worker.name() + " decode_worker=" +
          attempt_->decode_worker.name() + " sp_ranks=" + std::to_string(attempt_->prefill_worker.n_ranks()));
  v1::Started started;
  started.set_request_id(id());
  started.set_prompt_tokens(static_cast<std::uint32_t>(prompt_ids_.size()));
  started.set_profile(rung_->name);
  started.set_reason(reason_);
  started.set_ppl_increase(rung_->ppl_increase);
  started.set_ppl_base(context_.model.ppl_base);
  started.set_model(context_.model.name);
  sink_->OnStarted(started);
}

}  // namespace zeroc
