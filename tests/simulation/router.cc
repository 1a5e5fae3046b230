#include "tests/simulation/router.h"

#include <algorithm>
#include <utility>

#include "tests/simulation/decode_node.h"
#include "tests/simulation/model.h"
#include "tests/simulation/prefill_node.h"

namespace zeroc::simulation {
namespace {

constexpr std::uint32_t kAttemptsMax = 8;
constexpr int kWaitsMax = 200;
constexpr double kReserveTimeout = 5;
constexpr double kStatsTimeout = 1;

std::string Name(std::uint64_t id) { return "request " + std::to_string(id); }

}  // namespace

Router::Request* Router::Find(std::uint64_t id) {
  const auto it = running_.find(id);
  return it == running_.end() ? nullptr : &it->second;
}

void Router::Later(double seconds, std::function<void()> work) { world_.network().At(seconds, {}, std::move(work)); }

std::vector<std::uint64_t> Router::Running() const {
  std::vector<std::uint64_t> ids;
  for (const auto& [id, request] : running_) ids.push_back(id);
  return ids;
}

// --- begin and end ---

void Router::Begin(const RequestSpec& spec) {
  Request& request = running_[spec.id];
  request.spec = spec;
  request.content = Mix(world_.options().seed ^ Mix(spec.id));
  ++world_.report().n_requests;
  if (spec.cancel_after >= 0) Later(spec.cancel_after, [this, id = spec.id] { Cancel(id); });
  TryAttempt(spec.id);
}

void Router::Cancel(std::uint64_t id) {
  if (Find(id) != nullptr) End(id, Cancelled("the client went away"));
}

void Router::Restart() {
  for (const std::uint64_t id : Running()) End(id, Unavailable("the router was lost"));
}

void Router::End(std::uint64_t id, const Status& status) {
  const auto node = running_.extract(id);
  const Request& request = node.mapped();
  if (world_.logging()) world_.Log(Name(id) + " ends: " + status.ToString());
  if (!outcomes_.emplace(id, status).second) world_.Failed("ended twice", Name(id));
  WorldReport& report = world_.report();
  if (status.ok()) {
    ++report.n_ok;
    if (static_cast<int>(request.tokens.size()) != request.spec.n_output) {
      world_.Failed("stream", Name(id) + " ends with " + std::to_string(request.tokens.size()) + " of " +
                                  std::to_string(request.spec.n_output) + " tokens");
    }
  } else if (status.code() == StatusCode::kCancelled) {
    ++report.n_cancelled;
  } else {
    ++report.n_failed;
    if (request.spec.must_succeed) world_.Failed("probe", Name(id) + ": " + status.ToString());
  }
  if (request.attempt == nullptr) return;
  // A prefill worker may still owe the account of its transfer.
  const bool wait = status.ok() && PrefillDidItsPart(*request.attempt);
  if (wait) {
    Later(kStatsTimeout, [calls = request.attempt->prefill_calls] {
      for (const CallPtr& call : calls) call->Cancel();
    });
    request.attempt->prefill_calls.clear();
  }
  Drop(request.attempt);
}

// Cancels its calls and gives its lease back.
void Router::Drop(const AttemptPtr& attempt) {
  if (std::exchange(attempt->over, true)) return;
  if (attempt->decode_call != nullptr) attempt->decode_call->Cancel();
  for (const CallPtr& call : attempt->prefill_calls) {
    if (call != nullptr) call->Cancel();
  }
  if (std::exchange(attempt->leased, false)) ReleaseLease(attempt->lease);
}

void Router::ReleaseLease(const GrantedLease& lease) {
  world_.NewCall(lease.decode)->Start([this, lease] {
    if (DecodeNode* node = world_.decode(lease.decode)) node->Release(lease.key);
  });
}

// --- attempts ---

std::vector<std::string> Router::Pick(bool decode, std::size_t n, const std::string& wanted) {
  std::vector<std::string> alive;
  for (const std::string& name : world_.Names(decode)) {
    if (world_.Alive(name)) alive.push_back(name);
  }
  std::shuffle(alive.begin(), alive.end(), world_.rng());
  if (const auto it = std::find(alive.begin(), alive.end(), wanted); it != alive.end())
    std::iter_swap(it, alive.begin());
  alive.resize(std::min(alive.size(), n));
  return alive;
}

void Router::TryAttempt(std::uint64_t id) {
  Request* request = Find(id);
  if (request == nullptr) return;
  const RequestSpec& spec = request->spec;
  const auto prefills = Pick(false, static_cast<std::size_t>(spec.n_ranks), spec.prefill);
  const auto decodes = Pick(true, 1, spec.decode);
  if (prefills.empty() || decodes.empty()) return WaitForRoom(id, Unavailable("no worker is alive"));
  auto attempt = std::make_shared<Attempt>();
  attempt->number = ++request->n_attempts;
  if (world_.options().mistake == Mistake::kRepeatStreamedTokens) {
    attempt->n_streamed = 0;
  } else {
    attempt->n_streamed = static_cast<int>(request->tokens.size());
  }
  attempt->n_prompt = spec.n_prompt + attempt->n_streamed;
  attempt->decode = decodes[0];
  attempt->prefills = prefills;
  request->attempt = attempt;
  ++world_.report().n_attempts;
  if (!request->tokens.empty()) ++world_.report().n_migrations;
  Reserve(id, attempt);
}

void Router::WaitForRoom(std::uint64_t id, const Status& why) {
  Request* request = Find(id);
  if (++request->n_waits > kWaitsMax) return End(id, why);
  request->attempt = nullptr;
  Later(0.1 + world_.Random(0.4), [this, id] { TryAttempt(id); });
}

// Never cancelled: a grant that crossed with the cancel would be lost until it expires. It has a time-out of its own.
void Router::Reserve(std::uint64_t id, const AttemptPtr& attempt) {
  const Request& request = *Find(id);
  const CallPtr call = world_.NewCall(attempt->decode);
  call->on_event = [this, id, attempt](const RpcEvent& event) {
    if (attempt->over) return ReleaseLease(event.lease);  // ended while reserving
    attempt->leased = true;
    attempt->lease = event.lease;
    Start(id, attempt);
  };
  call->on_done = [this, id, attempt](const Status& status) {
    if (attempt->over || status.ok()) return;
    if (status.code() != StatusCode::kResourceExhausted) return AttemptFailed(id, attempt, status);
    attempt->over = true;
    ++world_.report().n_refused;
    Find(id)->n_attempts--;
    WaitForRoom(id, status);
  };
  const int max_tokens = request.spec.n_output - attempt->n_streamed;
  call->Start([this, id, call, attempt, max_tokens, format = request.spec.format] {
    if (DecodeNode* node = world_.decode(attempt->decode)) {
      node->Reserve(id, attempt->n_prompt, max_tokens, format, call);
    }
  });
  Later(kReserveTimeout, [call] { call->Break(DeadlineExceeded("no answer to Reserve")); });
}

void Router::Start(std::uint64_t id, const AttemptPtr& attempt) {
  const Request& request = *Find(id);
  const int max_tokens = request.spec.n_output - attempt->n_streamed;
  attempt->decode_call = world_.NewCall(attempt->decode);
  attempt->decode_call->on_event = [this, id, attempt](const RpcEvent& event) { OnDecodeEvent(id, attempt, event); };
  attempt->decode_call->on_done = [this, id, attempt](const Status& status) {
    if (attempt->over || attempt->final_seen) return;
    const Status why = status.ok() ? Internal("decode ended before its last message") : status;
    if (attempt->first_token_seen) return AttemptFailed(id, attempt, why);
    // Prefill, which may have ended the lease because its token was the last, has its say first.
    Later(kStatsTimeout, [this, id, attempt, why] { AttemptFailed(id, attempt, why); });
  };
  attempt->decode_call->Start([this, id, attempt, max_tokens, call = attempt->decode_call] {
    if (DecodeNode* node = world_.decode(attempt->decode)) node->Generate(attempt->lease.key, id, max_tokens, call);
  });
  const auto n_ranks = static_cast<std::uint16_t>(attempt->prefills.size());
  for (std::uint16_t rank = 0; rank < n_ranks; ++rank) {
    const std::string name = attempt->prefills[rank];
    const CallPtr call = world_.NewCall(name);
    call->on_event = [this, id, attempt](const RpcEvent& event) { OnPrefillEvent(id, attempt, event); };
    call->on_done = [this, id, attempt, rank](const Status& status) {
      if (rank == 0) return OnPrefillDone(id, attempt, status);
      // Rank 0, which may have ended the lease because its token was the last, has its say first.
      Later(kStatsTimeout, [this, id, attempt, status] { OnPrefillDone(id, attempt, status); });
    };
    attempt->prefill_calls.push_back(call);
    const PrefillArgs args{id,
                           attempt->number,
                           rank,
                           n_ranks,
                           request.content,
                           attempt->n_prompt,
                           request.spec.format,
                           max_tokens == 1,
                           attempt->lease};
    call->Start([this, name, args, call] {
      if (PrefillNode* node = world_.prefill(name)) node->Run(args, call);
    });
  }
}

bool Router::PrefillDidItsPart(const Attempt& attempt) const {
  return attempt.n_prefills_done == static_cast<int>(attempt.prefills.size()) ||
         (attempt.first_token_seen && attempt.admitted);
}

void Router::OnPrefillEvent(std::uint64_t id, const AttemptPtr& attempt, const RpcEvent& event) {
  if (attempt->over) return;
  if (event.kind == RpcEvent::Kind::kDone) {
    ++attempt->n_prefills_done;
    return;
  }
  if (attempt->first_token_seen) return world_.Failed("stream", Name(id) + ": two first tokens");
  attempt->first_token_seen = true;
  Emit(id, event.token);
  if (Find(id) == nullptr) return;
  if (event.last) {
    for (CallPtr& call : attempt->prefill_calls) call->on_done = nullptr;  // they end by themselves
    attempt->prefill_calls.clear();
    return End(id, OkStatus());
  }
  for (const std::int32_t token : std::exchange(attempt->early_tokens, {})) Emit(id, token);
  if (attempt->final_seen) End(id, OkStatus());
}

void Router::OnPrefillDone(std::uint64_t id, const AttemptPtr& attempt, const Status& status) {
  if (attempt->over || status.ok() || PrefillDidItsPart(*attempt)) return;
  AttemptFailed(id, attempt, status);
}

void Router::OnDecodeEvent(std::uint64_t id, const AttemptPtr& attempt, const RpcEvent& event) {
  if (attempt->over) return;
  switch (event.kind) {
    case RpcEvent::Kind::kAdmitted:
      attempt->admitted = true;
      break;
    case RpcEvent::Kind::kToken:
      if (attempt->first_token_seen) return Emit(id, event.token);
      attempt->early_tokens.push_back(event.token);
      break;
    case RpcEvent::Kind::kFinal:
      attempt->leased = false;  // decode has ended it
      attempt->final_seen = true;
      if (attempt->first_token_seen) End(id, OkStatus());
      break;
    default:
      break;
  }
}

// The client looks at every token.
void Router::Emit(std::uint64_t id, std::int32_t token) {
  Request* request = Find(id);
  if (request == nullptr) return;
  const int position = request->spec.n_prompt + static_cast<int>(request->tokens.size());
  if (token != TokenAt(request->content, position)) {
    return world_.Failed("wrong token", Name(id) + " attempt " + std::to_string(request->n_attempts) + " position " +
                                            std::to_string(position - request->spec.n_prompt));
  }
  request->tokens.push_back(token);
  if (static_cast<int>(request->tokens.size()) > request->spec.n_output) {
    world_.Failed("stream", Name(id) + " gets too many tokens");
  }
}

void Router::AttemptFailed(std::uint64_t id, const AttemptPtr& attempt, const Status& why) {
  Request* request = Find(id);
  if (request == nullptr || attempt->over) return;
  if (world_.logging()) world_.Log(Name(id) + " attempt " + std::to_string(attempt->number) + ": " + why.ToString());
  if (world_.options().calm || request->spec.must_succeed)
    world_.Failed("collateral", Name(id) + ": " + why.ToString());
  Drop(attempt);
  request->attempt = nullptr;
  // Only the last message was lost, not a token.
  if (static_cast<int>(request->tokens.size()) == request->spec.n_output) return End(id, OkStatus());
  if (request->n_attempts >= kAttemptsMax) {
    return End(id, Unavailable("tried " + std::to_string(kAttemptsMax) + " times, last: " + why.ToString()));
  }
  Later(world_.Random(0.2), [this, id] { TryAttempt(id); });
}

// Fails the attempts whose workers' heartbeats have stopped.
void Router::Tick() {
  for (const std::uint64_t id : Running()) {
    Request* request = Find(id);
    if (request == nullptr || request->attempt == nullptr) continue;
    const AttemptPtr attempt = request->attempt;
    const bool prefill_lost =
        !PrefillDidItsPart(*attempt) && std::any_of(attempt->prefills.begin(), attempt->prefills.end(),
                                                    [&](const std::string& name) { return !world_.Alive(name); });
    if (prefill_lost || !world_.Alive(attempt->decode)) {
      AttemptFailed(id, attempt, Unavailable("a worker's heartbeats have stopped"));
    }
  }
  Later(0.5, [this] { Tick(); });
}

}  // namespace zeroc::simulation
