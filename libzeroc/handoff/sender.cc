#include "libzeroc/handoff/sender.h"

#include <algorithm>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/checksum.h"

namespace zeroc {

namespace {

// The transport cancels what is under way when the connection is closed here, perhaps because of another job. This job
// was not cancelled: it may be tried again elsewhere.
Status Lost(const Status& status) {
  return status.code() == StatusCode::kCancelled ? Unavailable(std::string(status.message())) : status;
}

}  // namespace

Sender::Sender(const Options& options, LeaseKey lease, const Share& share, BlockTable remote, std::string peer_name)
    : options_(options),
      lease_(lease),
      share_(share),
      remote_(std::move(remote)),
      peer_name_(std::move(peer_name)),
      remote_extents_(remote_.Extents()),
      block_seen_(remote_.n_blocks()) {
  ZEROC_CHECK(share_.rank < share_.n_ranks && share_.n_ranks <= kRanksMax && share_.n_blocks <= remote_.n_blocks(),
              share_.rank, share_.n_ranks, share_.n_blocks, remote_.n_blocks());
  checksums_.reserve(share_.n_blocks);
}

void Sender::Send(const Message& message, std::int64_t now_ns, SenderActions* out) {
  last_sent_ns_ = now_ns;
  out->push_back(PostMessage{EncodeMessage(message)});
}

void Sender::SendAttach(std::int64_t now_ns, SenderActions* out) {
  attach_sent_ = true;
  Send(AttachMessage{lease_, share_.rank, share_.n_ranks, delivery_,
                     static_cast<std::uint32_t>(remote_.n_prompt_tokens()), remote_.identity().layout_hash},
       now_ns, out);
}

SenderActions Sender::OnPeerUp(Delivery delivery, std::int64_t now_ns) {
  SenderActions out;
  if (ended_ || phase_ != Phase::kConnecting) return out;
  delivery_ = delivery;
  phase_ = Phase::kAttaching;
  last_progress_ns_ = now_ns;
  SendAttach(now_ns, &out);
  return out;
}

// --- blocks ---

Result<SenderActions> Sender::OnBlocksReady(const SequenceKv& kv, const FinalBlocks& blocks, std::int64_t now_ns) {
  SenderActions out;
  if (ended_ || stopping()) return out;
  if (!local_.has_value()) {
    // The table is foreign: no more may be present than lasts.
    if (remote_.n_present() > kv.format().LastingBlocksAt(remote_.n_prompt_tokens())) {
      return FailedPrecondition("lease: " + std::to_string(remote_.n_present()) + " blocks are called present, " +
                                std::to_string(kv.format().LastingBlocksAt(remote_.n_prompt_tokens())) +
                                " have their lasting form");
    }
    BlockTable local = BlockTable::Of(kv, remote_.n_prompt_tokens(), remote_.identity().model_fingerprint,
                                      remote_.identity().plan_id, remote_.n_present());
    ZEROC_RETURN_IF_ERROR(remote_.CheckSameShape(local));
    local_ = std::move(local);
  }
  ZEROC_RETURN_IF_ERROR(AddBlocks(kv, local_->layer(blocks.layer), blocks));
  if (phase_ == Phase::kStreaming) PostBlocks(now_ns, &out);
  Advance(now_ns, &out);
  return out;
}

Status Sender::AddBlocks(const SequenceKv& kv, const BlockTable::Layer& local, const FinalBlocks& blocks) {
  std::vector<std::uint32_t> idxs;
  std::vector<BlockSpan> ready;
  const auto add = [&](std::uint32_t block_idx, BlockRef ref) {
    ZEROC_CHECK(!block_seen_[block_idx], block_idx);
    block_seen_[block_idx] = true;
    idxs.push_back(block_idx);
    ready.push_back({ref, remote_extents_[block_idx].bytes});
  };
  const auto n_packed = static_cast<std::uint32_t>(local.blocks.n_packed());
  const bool has_sink = local.blocks.sink.valid();
  // Of what the engine counts from the prompt's first block on, the present ones are not in the list.
  const int skipped_packed = kv.format().packs ? remote_.n_present() : 0;
  const int skipped_exact = remote_.n_present() - skipped_packed;
  for (const BlockRange& range : blocks.packed) {
    for (int b = std::max(range.begin - skipped_packed, 0); b < range.end - skipped_packed; ++b) {
      add(local.first_block + static_cast<std::uint32_t>(b), local.blocks.packed_ref(static_cast<std::size_t>(b)));
    }
  }
  if (blocks.sink && has_sink) add(local.first_block + n_packed, local.blocks.sink);
  const std::uint32_t first_exact = local.first_block + n_packed + (has_sink ? 1 : 0);
  for (int b = std::max(blocks.exact_begin - skipped_exact, 0); b < blocks.exact_end - skipped_exact; ++b) {
    add(first_exact + static_cast<std::uint32_t>(b), local.blocks.exact.at(static_cast<std::size_t>(b)));
  }
  ZEROC_RETURN_IF_ERROR(kv.pool().ToWire(ready));
  for (std::size_t i = 0; i < ready.size(); ++i) {
    const std::span<const std::byte> local_bytes(kv.pool().WireData(ready[i].ref), ready[i].bytes);
    checksums_.push_back({idxs[i], Checksum64(local_bytes)});
    unposted_.push_back({local_bytes, remote_extents_[idxs[i]].offset});
  }
  return OkStatus();
}

// Neighbours on both sides travel as one write.
void Sender::PostBlocks(std::int64_t now_ns, SenderActions* out) {
  std::size_t i = 0;
  while (i < unposted_.size()) {
    PostWrite write{unposted_[i].local, unposted_[i].remote_offset};
    std::size_t n = 1;
    for (; i + n < unposted_.size(); ++n) {
      const Block& next = unposted_[i + n];
      const std::size_t bytes = write.local.size();
      if (write.local.data() + bytes != next.local.data() || write.remote_offset + bytes != next.remote_offset ||
          bytes + next.local.size() > options_.write_bytes_max) {
        break;
      }
      write.local = {write.local.data(), bytes + next.local.size()};
    }
    ++stats_.n_writes;
    stats_.bytes_posted += write.local.size();
    stats_.n_blocks += n;
    if (writes_pending_++ == 0) last_progress_ns_ = now_ns;
    wire_.Begin(now_ns);
    out->push_back(write);
    i += n;
  }
  unposted_.clear();
}

SenderActions Sender::OnFirstToken(FirstToken token, std::int64_t now_ns) {
  SenderActions out;
  has_first_token_ = true;
  first_token_ = std::move(token);
  Advance(now_ns, &out);
  return out;
}

// From streaming to the flush once everything is posted, and from the flush to the commit.
void Sender::Advance(std::int64_t now_ns, SenderActions* out) {
  if (phase_ == Phase::kStreaming && stats_.n_blocks == share_.n_blocks && (share_.rank != 0 || has_first_token_)) {
    phase_ = Phase::kFlushing;
    last_progress_ns_ = now_ns;
    if (stats_.n_writes > 0) wire_.Begin(now_ns);
  }
  if (phase_ != Phase::kFlushing || flush_pending_) return;
  if (!flushed_) {
    // A flush that failed for another job's write is repeated when our own writes are known to be over.
    if (n_flushes_ > 0 && writes_pending_ > 0) return;
    if (n_flushes_ >= options_.flushes_max) {
      return Stop(Unavailable("decode worker " + peer_name_ + ": the flush of the KV writes keeps failing"), now_ns,
                  out);
    }
    ++n_flushes_;
    flush_pending_ = true;
    out->push_back(PostFlush{});
    return;
  }
  if (writes_pending_ > 0) return;
  phase_ = Phase::kCommitting;
  last_progress_ns_ = now_ns;
  local_done_ = true;
  out->push_back(LocalDone{});
  SendCommit(now_ns, out);
}

void Sender::SendCommit(std::int64_t now_ns, SenderActions* out) {
  const std::size_t n_parts = std::max<std::size_t>(1, (checksums_.size() + kCommitBlocksMax - 1) / kCommitBlocksMax);
  for (std::size_t part = 0; part < n_parts; ++part) {
    CommitMessage commit;
    commit.lease = lease_;
    commit.rank = share_.rank;
    commit.part = static_cast<std::uint16_t>(part);
    commit.n_parts = static_cast<std::uint16_t>(n_parts);
    commit.has_first_token = share_.rank == 0 && part == 0;
    if (commit.has_first_token) commit.first_token = first_token_;
    const auto begin = checksums_.begin() + static_cast<std::ptrdiff_t>(part * kCommitBlocksMax);
    const auto n = std::min(kCommitBlocksMax, checksums_.size() - part * kCommitBlocksMax);
    commit.blocks.assign(begin, begin + static_cast<std::ptrdiff_t>(n));
    Send(commit, now_ns, out);
  }
}

// --- events ---

SenderActions Sender::OnWriteDone(const Status& status, std::int64_t now_ns) {
  SenderActions out;
  ZEROC_CHECK(writes_pending_ > 0);
  --writes_pending_;
  last_progress_ns_ = now_ns;
  if (writes_pending_ == 0 && phase_ == Phase::kStreaming) wire_.End(now_ns);
  if (ended_) return out;
  if (!status.ok() && !stopping()) {
    Stop(Lost(status).WithContext("KV write to decode worker " + peer_name_), now_ns, &out);
  } else if (stopping()) {
    AdvanceStop(now_ns, &out);
  } else {
    Advance(now_ns, &out);
  }
  return out;
}

SenderActions Sender::OnFlushDone(const Status& status, std::int64_t now_ns) {
  SenderActions out;
  ZEROC_CHECK(flush_pending_);
  flush_pending_ = false;
  last_progress_ns_ = now_ns;
  if (ended_) return out;
  flushed_ = status.ok();
  if (stopping()) {
    AdvanceStop(now_ns, &out);
  } else if (status.ok() || status.code() == StatusCode::kFailedPrecondition ||
             status.code() == StatusCode::kOutOfRange) {
    // Those two codes concern single writes, perhaps of another job on this connection; ours report for themselves.
    Advance(now_ns, &out);
  } else {
    Stop(Lost(status).WithContext("flush to decode worker " + peer_name_), now_ns, &out);
  }
  return out;
}

SenderActions Sender::OnMessage(const Message& message, std::int64_t now_ns) {
  SenderActions out;
  if (ended_ || !(LeaseOf(message) == lease_)) return out;
  if (const auto* ack = std::get_if<AttachAckMessage>(&message)) {
    if (stopping()) return out;
    if (!ack->status.ok()) {
      Stop(ack->status.WithContext("decode worker " + peer_name_ + " refused the transfer"), now_ns, &out);
    } else if (phase_ == Phase::kAttaching) {
      phase_ = Phase::kStreaming;
      last_progress_ns_ = now_ns;
      PostBlocks(now_ns, &out);
      Advance(now_ns, &out);
    }
  } else if (const auto* commit_ack = std::get_if<CommitAckMessage>(&message)) {
    if (phase_ == Phase::kCommitting && commit_ack->status.ok()) {
      Finish(OkStatus(), now_ns, &out);
    } else if (phase_ == Phase::kCommitting) {
      Stop(commit_ack->status.WithContext("decode worker " + peer_name_ + " refused the commit"), now_ns, &out);
    } else if (released_sent_ && commit_ack->status.ok()) {
      Finish(stop_status_, now_ns, &out);  // the lease had been committed: nothing is in quarantine
    }
  } else if (const auto* ended = std::get_if<LeaseEndedMessage>(&message)) {
    if (released_sent_) {
      Finish(stop_status_, now_ns, &out);
    } else if (!stopping()) {
      Stop(ended->status.WithContext("decode worker " + peer_name_ + " ended the lease"), now_ns, &out);
    }
  }
  return out;
}

SenderActions Sender::OnPeerFailure(const Status& status, std::int64_t now_ns) {
  SenderActions out;
  if (ended_ || peer_gone_) return out;
  peer_gone_ = true;
  if (stopping()) {
    AdvanceStop(now_ns, &out);
  } else {
    Stop(Unavailable("decode worker " + peer_name_ + " was lost: " + std::string(status.message())), now_ns, &out);
  }
  return out;
}

SenderActions Sender::Cancel(const Status& why, std::int64_t now_ns) {
  SenderActions out;
  if (!ended_ && !stopping()) Stop(why, now_ns, &out);
  return out;
}

// --- the end ---

void Sender::Stop(const Status& why, std::int64_t now_ns, SenderActions* out) {
  phase_ = Phase::kStopping;
  stop_status_ = why.ok() ? Cancelled("stopped") : why;
  unposted_.clear();
  last_progress_ns_ = now_ns;
  n_flushes_ = 0;
  flushed_ = flushed_ && !flush_pending_;
  if (attach_sent_ && !peer_gone_) Send(AbortMessage{lease_, share_.rank, stop_status_}, now_ns, out);
  AdvanceStop(now_ns, out);
}

void Sender::AdvanceStop(std::int64_t now_ns, SenderActions* out) {
  if (writes_pending_ > 0) return;
  if (!local_done_) {
    local_done_ = true;
    out->push_back(LocalDone{});
  }
  if (peer_gone_ || !attach_sent_) return Finish(stop_status_, now_ns, out);
  // One-sided writes are over for us before they are over at the peer: Released has to wait for the flush.
  if (delivery_ == Delivery::kPut && stats_.n_writes > 0 && !flushed_) {
    if (flush_pending_ || n_flushes_ >= options_.flushes_max) return;  // then the time-out closes the peer
    ++n_flushes_;
    flush_pending_ = true;
    out->push_back(PostFlush{});
    return;
  }
  if (released_sent_) return;
  released_sent_ = true;
  Send(ReleasedMessage{lease_, share_.rank}, now_ns, out);
}

void Sender::Finish(Status status, std::int64_t now_ns, SenderActions* out) {
  ended_ = true;
  stats_.ended_ns = now_ns;
  wire_.End(now_ns);
  out->push_back(SenderEnded{std::move(status)});
}

// Whether it is the peer's turn; otherwise the engine's.
bool Sender::WaitsForPeer() const {
  return phase_ == Phase::kAttaching || phase_ == Phase::kFlushing || phase_ == Phase::kCommitting ||
         (phase_ == Phase::kStreaming && writes_pending_ > 0);
}

bool Sender::TimedOut(std::int64_t now_ns, std::int64_t link_progress_ns, std::int64_t timeout_ns) const {
  const std::int64_t silent_ns = now_ns - last_progress_ns_;
  if (silent_ns < timeout_ns) return false;
  const bool in_transport = writes_pending_ > 0 || flush_pending_;
  return !in_transport || now_ns - link_progress_ns >= timeout_ns ||
         silent_ns / options_.busy_link_factor >= timeout_ns;
}

SenderActions Sender::Tick(std::int64_t now_ns, std::int64_t link_progress_ns) {
  SenderActions out;
  if (ended_) return out;
  const bool resend = now_ns - last_sent_ns_ >= options_.resend_ns;
  if (WaitsForPeer() && TimedOut(now_ns, link_progress_ns, options_.answer_timeout_ns)) {
    Stop(Unavailable("decode worker " + peer_name_ + " has not answered for " +
                     std::to_string((now_ns - last_progress_ns_) / 1'000'000) + " ms"),
         now_ns, &out);
    return out;
  }
  switch (phase_) {
    case Phase::kConnecting:
      break;  // the transport bounds it
    case Phase::kAttaching:
      if (resend) SendAttach(now_ns, &out);
      break;
    case Phase::kStreaming:
    case Phase::kFlushing:
      if (now_ns - last_sent_ns_ >= options_.heartbeat_ns) SendAttach(now_ns, &out);
      break;
    case Phase::kCommitting:
      if (resend) SendCommit(now_ns, &out);
      break;
    case Phase::kStopping:
      if (released_sent_ && resend) Send(ReleasedMessage{lease_, share_.rank}, now_ns, &out);
      if (!close_asked_ && TimedOut(now_ns, link_progress_ns, options_.stop_timeout_ns)) {
        close_asked_ = true;
        out.push_back(ClosePeer{});
      }
      break;
  }
  return out;
}

std::optional<EncodedMessage> AnswerWithoutSender(const Message& message) {
  const auto* ended = std::get_if<LeaseEndedMessage>(&message);
  if (ended == nullptr || !ended->wants_release) return std::nullopt;
  return EncodeMessage(ReleasedMessage{ended->lease, ended->rank});
}

}  // namespace zeroc
