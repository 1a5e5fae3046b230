#include "services/prefill/prefill_request.h"

#include <chrono>
#include <utility>

#include "libzeroc/engine/decode_engine.h"
#include "libzeroc/handoff/byte_codec.h"
#include "services/common/logging.h"
#include "services/worker/proto_convert.h"

namespace zeroc {
namespace {

double Seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

}  // namespace

std::int64_t PrefillNowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

PrefillCore::Request::Request(PrefillCore& core_in, Key key_in, Sink sink_in, Sender sender_in)
    : core(core_in), key(std::move(key_in)), sink(std::move(sink_in)), sender(std::move(sender_in)) {}

void PrefillCore::Request::Do(SenderActions actions) {
  for (SenderAction& action : actions) {
    const auto self = shared_from_this();
    if (const auto* write = std::get_if<PostWrite>(&action)) {
      core.transport_->Write(peer, sender.lease().tag(), write->local, write->remote_offset, [self](const Status& s) {
        self->link_progress_ns->store(PrefillNowNs(), std::memory_order_relaxed);
        self->Drive([&s](Sender& sender_, std::int64_t now) { return sender_.OnWriteDone(s, now); });
      });
    } else if (std::get_if<PostFlush>(&action) != nullptr) {
      core.transport_->Flush(peer, [self](const Status& s) {
        self->link_progress_ns->store(PrefillNowNs(), std::memory_order_relaxed);
        self->Drive([&s](Sender& sender_, std::int64_t now) { return sender_.OnFlushDone(s, now); });
      });
    } else if (const auto* post = std::get_if<PostMessage>(&action)) {
      // Without an answer it is sent again; a dead peer is reported by itself.
      core.transport_->Send(peer, post->message.type, AsBytes(post->message.payload), [](const Status&) {});
    } else if (std::get_if<ClosePeer>(&action) != nullptr) {
      core.transport_->Close(peer, [self](const Status&) {
        self->core.OnPeerFailure(self->peer, Unavailable("it was silent and the connection has been closed"));
      });
    } else if (std::get_if<LocalDone>(&action) != nullptr) {
      core.OnLocalDone(self);
    } else {
      const Status& status = std::get<SenderEnded>(action).status;
      if (status.ok() || first_token_final) sink->Send(Done());
      sink->End(first_token_final ? OkStatus() : status);
      if (!status.ok() && !first_token_final) {
        LogWarning("transfer failed request=" + EscapeControls(key.first) + " error=\"" +
                   EscapeControls(status.ToString()) + "\"");
      }
      core.OnEnded(self);
    }
  }
}

v1::PrefillEvent PrefillCore::Request::Done() {
  const SenderStats& stats = sender.stats();
  v1::PrefillEvent event;
  v1::PrefillDone* done = event.mutable_done();
  done->set_queue_seconds(Seconds(started_ns - arrived_ns));
  done->set_prefill_seconds(Seconds(computed_ns - started_ns));
  done->set_wire_seconds(Seconds(sender.WireNs(stats.ended_ns)));
  done->set_wire_hidden_seconds(Seconds(wire_hidden_ns));
  done->mutable_kv_bytes()->set_raw(core.model_.RawKvBytes(n_prompt_tokens));
  done->mutable_kv_bytes()->set_packed(sender.remote().n_bytes() + sender.remote().n_present_bytes());
  // Decode has acknowledged all ranks' commits: together they have sent every block of the lease.
  done->mutable_kv_bytes()->set_wire(n_ranks > 1 && stats.bytes_posted > 0 ? sender.remote().n_bytes()
                                                                           : stats.bytes_posted);
  done->set_transport(transport);
  if (n_ranks > 1) {
    done->set_sp_ranks(static_cast<std::uint32_t>(n_ranks));
    done->set_sp_scheme(sp_scheme);
    done->set_sp_bytes(sp_bytes);
  }
  Metrics& metrics = core.metrics_;
  if (rank == 0) {  // the prompt is one, however many ranks it has
    metrics.AddKvBytes("raw", done->kv_bytes().raw());
    metrics.AddKvBytes("packed", done->kv_bytes().packed());
  }
  metrics.AddKvBytes("wire", stats.bytes_posted);
  if (stats.n_writes > 0) metrics.ObserveKvTransfer(done->wire_seconds());
  return event;
}

// --- the engine's thread ---

void PrefillCore::Request::OnStarted(int n_cached) {
  MutexLock lock(mu);
  n_cached_tokens = n_cached;
  if (core.cache_ != nullptr && n_ranks == 1) {
    core.metrics_.AddPrefixCacheLookup(static_cast<std::uint64_t>(n_prompt_tokens),
                                       static_cast<std::uint64_t>(n_cached));
  }
  started_ns = PrefillNowNs();
  if (rank == 0) core.metrics_.ObserveQueueTime(Seconds(started_ns - arrived_ns));
}

void PrefillCore::Request::OnBlocksReady(const SequenceKv& kv, const ReadyBlocks& blocks) {
  Drive([&](Sender& sender_, std::int64_t now) {
    const FinalBlocks final{blocks.layer, blocks.packed, blocks.sink, blocks.exact_begin, blocks.exact_end};
    Result<SenderActions> actions = sender_.OnBlocksReady(kv, final, now);
    return actions.ok() ? std::move(*actions) : sender_.Cancel(actions.status(), now);
  });
}

void PrefillCore::Request::OnFirstToken(const SequenceKv&, const SampledToken& token) {
  MutexLock lock(mu);
  computed_ns = PrefillNowNs();
  if (shared != nullptr) {
    sp_bytes = static_cast<std::uint64_t>(shared->sent().total());
    core.metrics_.AddSpBytes(sp_scheme, sp_bytes);
  }
  wire_hidden_ns = sender.WireNs(computed_ns);
  FinishReason reason;
  const bool ends = EndsRequest(sampling, core.model_.config().eos_ids, token, 1, &reason);
  core.metrics_.ObservePrefillTime(Seconds(computed_ns - started_ns));
  core.metrics_.AddPromptTokens(static_cast<std::uint64_t>(n_prompt_tokens));
  if (!sender.stopping() && !sender.ended()) {
    v1::PrefillEvent event;
    v1::FirstToken* first = event.mutable_first_token();
    first->set_id(static_cast<std::uint32_t>(token.id));
    if (sampling.logprobs >= 0) *first->mutable_logprobs() = LogprobsToProto(token);
    first->set_queue_seconds(Seconds(started_ns - arrived_ns));
    first->set_prefill_seconds(Seconds(computed_ns - started_ns));
    first->set_n_cached_tokens(static_cast<std::uint32_t>(n_cached_tokens));
    if (ends) first->set_finish_reason(FinishToProto(reason));
    sink->Send(std::move(event));
  }
  if (!ends) {
    return Do(sender.OnFirstToken(
        {token.id, token.logprob, token.top, sampling.seed, static_cast<std::uint32_t>(n_prompt_tokens)}, computed_ns));
  }
  first_token_final = !sender.stopping() && !sender.ended();
  Do(sender.Cancel(Cancelled("the first token ended the request"), computed_ns));
}

void PrefillCore::Request::OnFailed(const Status& status) {
  Drive([&](Sender& sender_, std::int64_t now) { return sender_.Cancel(status, now); });
}

}  // namespace zeroc
