// Prompts that the ranks of a prefill group compute together: the part of PrefillCore that knows of other ranks.
#include <chrono>
#include <utility>

#include "services/common/logging.h"
#include "services/prefill/prefill_core.h"
#include "services/prefill/prefill_request.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

// A follower answers nobody: its leader hears of failures, decode of the rest.
class QuietSink final : public EventSink<v1::PrefillEvent> {
 public:
  void Send(v1::PrefillEvent) override {}
  void End(const Status&) override {}
};

}  // namespace

// --- the leader ---

Result<SpOptions> PrefillCore::OptionsForLeader(const v1::PrefillRequest& request) const {
  const auto n_ranks = static_cast<int>(request.sp_ranks());
  if (group_ == nullptr || n_ranks != group_->size()) {
    return FailedPrecondition("the prompt is for " + std::to_string(n_ranks) + " ranks, this worker's group has " +
                              std::to_string(group_ == nullptr ? 1 : group_->size()));
  }
  if (group_->ready_ranks() == 1) return Unavailable("the prefill group is not formed");
  ZEROC_ASSIGN_OR_RETURN(const std::shared_ptr<const KvFormat> format,
                         model_.FormatFor(request.model_fingerprint(), request.plan_id(), request.profile()));
  if (request.token_ids_size() == 0) return InvalidArgument("a prompt of 0 tokens");
  SpOptions options;
  options.patience = group_->options().patience;
  options.scheme = ResolveSpScheme(group_->options().scheme, *format, static_cast<int>(model_.config().n_heads),
                                   request.token_ids_size(), n_ranks, model_.ops().act_bytes);
  return options;
}

// --- a follower ---

Status PrefillCore::JoinGroup(const v1::JoinGroupRequest& request, v1::JoinGroupResponse* response) {
  if (draining_) return Unavailable("the prefill worker is stopping");
  if (group_ != nullptr) return FailedPrecondition("this worker leads a prefill group itself");
  // Its communicator reaches host memory.
  if (!model_.model().kv_memory().is_host()) return Unimplemented("groups compute on the CPU only as yet");
  if (request.model_fingerprint() != model_.fingerprint() || request.plan_id() != model_.plan_id()) {
    return FailedPrecondition("the group of " + EscapeControls(request.leader()) +
                              " serves another model or plan than this worker");
  }
  ZEROC_ASSIGN_OR_RETURN(const PeerAddress address, member_->Join());
  metrics_.AddSpBytes(SpSchemeName(SpScheme::kAllGather), 0);  // on the page from now on
  response->set_transport_address(address.bytes);
  return OkStatus();
}

void PrefillCore::ServeGroup(const v1::ServeGroupRequest& request, const GroupMember::Sink& sink) {
  if (draining_) return sink->End(Unavailable("the prefill worker is stopping"));
  member_->Serve(request, sink);
}

Status PrefillCore::RunShare(const v1::ShareRequest& share) {
  ZEROC_ASSIGN_OR_RETURN(const GroupMember::Rank rank, member_->Find(share.epoch()));
  ZEROC_ASSIGN_OR_RETURN(const SpScheme scheme, SpSchemeFromName(share.scheme()));
  if (scheme == SpScheme::kAuto || share.patience_ms() == 0 || share.patience_ms() > 3'600'000) {
    return InvalidArgument("a share needs a scheme other than auto and a patience of 1 ms to 1 h");
  }
  const Place place{rank.rank, rank.size};
  const v1::PrefillRequest& request = share.request();
  ZEROC_ASSIGN_OR_RETURN(const RequestPtr added, MakeRequest(request, std::make_shared<QuietSink>(), place));
  Connection connection;
  ZEROC_RETURN_IF_ERROR(Connect(request, added, &connection));
  if (connection.up) OnPeerUp(connection.peer, connection.info);
  const std::int64_t deadline_ns =
      share.timeout_ms() == 0 ? 0 : PrefillNowNs() + std::int64_t{share.timeout_ms()} * 1'000'000;
  const SpOptions options{scheme, share.number(), milliseconds(share.patience_ms())};
  AddShare({added, JobOf(request, added, deadline_ns), options, place, {}, share.epoch(), rank.comm});
  return OkStatus();
}

// --- both ---

void PrefillCore::AddShare(Share share) {
  const Key key = share.request->key;
  const bool posted = engine_thread_->Post([this, share = std::move(share)]() mutable {
    shares_.push_back(std::move(share));
    PublishUsage();
  });
  if (!posted) Cancel(key, Unavailable("the prefill worker is stopping"));
}

// The front share's turn: false when there is none, or it has to wait for blocks.
bool PrefillCore::StepShare() {
  if (shares_.empty()) return false;
  Share& share = shares_.front();
  const RequestPtr request = share.request;
  const std::int64_t now = PrefillNowNs();
  const auto end = [&](const Status& status) {
    request->OnFailed(status);
    EndShare(status);
    return true;
  };
  // A rank whose blocks decode has, or that has none, may be done with decode before its turn here: others need it.
  if (request->Unwanted()) {
    EndShare(Cancelled("the prompt is not wanted any more"));
    return true;
  }
  if (share.job.deadline_ns != 0 && now >= share.job.deadline_ns) {
    return end(DeadlineExceeded("the deadline passed before the group had its turn"));
  }
  const SpSplit split(static_cast<int>(share.job.tokens.size()), share.place.n_ranks);
  auto made = SharedPrefill::Create(model_.config(), pool_->pool(), share.job, split, share.place.rank);
  if (!made.ok()) {
    const bool may_wait =
        made.status().code() == StatusCode::kResourceExhausted && pool_->pool().usage().n_blocks_used > 0;
    return may_wait ? false : end(made.status());
  }
  if (share.place.rank == 0) {
    const std::int64_t left = share.job.deadline_ns == 0 ? 0 : (share.job.deadline_ns - now) / 1'000'000;
    Result<PrefillGroup::Begun> begun = group_->Begin(share.for_followers, share.options.scheme, milliseconds(left));
    if (!begun.ok()) return end(begun.status());
    share.comm = begun->comm;
    share.options.job = begun->number;
    const SpBytes predicted =
        PredictSpBytes(share.options.scheme, *share.job.format, static_cast<int>(model_.config().n_heads),
                       split.n_tokens(), split.n_ranks(), model_.ops().act_bytes, /*all_logits=*/false);
    LogInfo("prefill group prompt request=" + EscapeControls(request->key.first) +
            " ranks=" + std::to_string(split.n_ranks()) + " scheme=" + std::string(SpSchemeName(share.options.scheme)) +
            " tokens=" + std::to_string(split.n_tokens()) +
            " predicted_bytes_per_rank=" + std::to_string(static_cast<std::int64_t>(predicted.total())));
  }
  request->shared = std::move(*made);  // its blocks stay until the wire has taken them
  {
    MutexLock lock(request->mu);
    request->sp_scheme = SpSchemeName(share.options.scheme);
  }
  const Status status = request->shared->Run(model_.model(), *share.comm, share.options);
  // A leader that comes to its end has counted before it announced the first token.
  if (share.place.rank > 0 || !status.ok()) {
    metrics_.AddSpBytes(SpSchemeName(share.options.scheme),
                        static_cast<std::uint64_t>(request->shared->sent().total()));
  }
  metrics_.ObserveIterationTokens(split.CountTokens(share.place.rank));
  if (request->released) request->shared.reset();  // the wire was done with it before
  EndShare(status);
  return true;
}

// Of the front share. A share that fails fails for the whole group: whoever waits for this rank would wait in vain.
void PrefillCore::EndShare(const Status& status) {
  const Share share = std::move(shares_.front());
  shares_.pop_front();
  if (share.place.rank == 0) {
    group_->Ended(share.comm != nullptr ? status : OkStatus());  // what never began is no reason to part
  } else if (!status.ok()) {
    share.comm->Abort(status);
    member_->Report(share.epoch, share.options.job, status);
  }
}

}  // namespace zeroc
