#include "tests/simulation/prefill_node.h"

#include <algorithm>

#include "libzeroc/handoff/byte_codec.h"
#include "tests/simulation/model.h"
#include "tests/simulation/world.h"

namespace zeroc::simulation {

using handoff_test::kModel;
using handoff_test::kPlan;

PrefillNode::PrefillNode(World& world, std::string name, std::span<std::byte> memory)
    : world_(world), name_(std::move(name)), memory_(memory), pool_(BlockPool::Create(memory, 64 << 10).value()) {
  TransportOptions options;
  options.name = name_;
  options.piece_bytes = 4096;
  options.pieces_in_flight_max = world_.options().pieces_in_flight_max;
  options.connect_timeout_ms = 2000;
  transport_ = world_.network().Create(options, *this).value();
  Tick();
}

std::int64_t PrefillNode::Now() const { return world_.NowNs(name_); }

void PrefillNode::Post(double delay, std::function<void()> work) {
  world_.network().At(delay, name_, [weak = std::weak_ptr<int>(life_), work = std::move(work)] {
    if (!weak.expired()) work();
  });
}

void PrefillNode::Tick() {
  world_.Heartbeat(name_);
  for (const JobPtr& job : JobsOf(PeerId::kNone)) Do(job, job->sender->Tick(Now(), *job->link_progress_ns));
  Post(0.1, [this] { Tick(); });
}

std::vector<PrefillNode::JobPtr> PrefillNode::JobsOf(PeerId peer) const {
  std::vector<JobPtr> found;
  for (const auto& [key, job] : jobs_) {
    if (peer == PeerId::kNone || job->peer == peer) found.push_back(job);
  }
  return found;
}

// --- shares ---

PrefillNode::Part PrefillNode::PartOf(const BlockTable::Layer& layer, int rank, int n_ranks, int chunk) {
  const int n_packed = static_cast<int>(layer.blocks.n_packed());
  const int n_exact = static_cast<int>(layer.blocks.exact.size());
  // Ranks divide the blocks, chunks divide a rank's packed blocks; the exact ones come with the last chunk.
  const int begin = n_packed * rank / n_ranks, end = n_packed * (rank + 1) / n_ranks;
  Part part;
  part.packed = {begin + (end - begin) * chunk / kChunks, begin + (end - begin) * (chunk + 1) / kChunks};
  part.sink = rank == 0 && chunk == 0 && layer.blocks.sink.valid();
  if (chunk == kChunks - 1) part.exact = {n_exact * rank / n_ranks, n_exact * (rank + 1) / n_ranks};
  return part;
}

std::uint32_t PrefillNode::ShareOf(const BlockTable& table, int rank, int n_ranks) {
  int n = 0;
  for (int l = 0; l < table.n_layers(); ++l) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const Part part = PartOf(table.layer(l), rank, n_ranks, chunk);
      n += part.packed.end - part.packed.begin + part.exact.end - part.exact.begin + (part.sink ? 1 : 0);
    }
  }
  return static_cast<std::uint32_t>(n);
}

// --- Run ---

void PrefillNode::Run(const PrefillArgs& args, const CallPtr& call) {
  auto parsed = BlockTable::Parse(AsBytes(args.lease.layout));
  if (!parsed.ok()) return call->End(parsed.status());
  if (Status status = parsed->CheckPlaces(args.lease.arena.bytes); !status.ok()) return call->End(status);
  const Key key{args.request, args.attempt};
  if (jobs_.contains(key)) return call->End(Status(StatusCode::kAlreadyExists, "running already"));
  Connection& cached = connections_[args.lease.address.bytes + ":" + std::to_string(args.lease.arena.base)];
  if (cached.peer == PeerId::kNone) {
    cached.peer = transport_->Connect(args.lease.address, args.lease.arena, args.lease.decode).value();
  }
  const Sender::Share share{args.rank, args.n_ranks, ShareOf(*parsed, args.rank, args.n_ranks)};
  auto job = std::make_shared<Job>();
  job->args = args;
  job->call = call;
  job->peer = cached.peer;
  job->link_progress_ns = cached.progress_ns;
  job->sender = std::make_unique<SenderSeam>(
      world_.options().mistake,
      Sender(world_.options().sender, args.lease.key, share, std::move(parsed).value(), args.lease.decode));
  jobs_[key] = job;
  call->on_cancel = [this, job, weak = std::weak_ptr<int>(life_)] {
    if (!weak.expired()) Do(job, job->sender->Cancel(Cancelled("the caller is gone"), Now()));
  };
  if (cached.up) Do(job, job->sender->OnPeerUp(cached.info.delivery, Now()));
  queue_.push_back(job);
  WakeEngine();
}

// --- the engine ---

void PrefillNode::WakeEngine() {
  if (engine_awake_ || queue_.empty()) return;
  engine_awake_ = true;
  Post(world_.options().compute_seconds * (0.5 + world_.Random(1)), [this] {
    engine_awake_ = false;
    EngineStep();
    WakeEngine();
  });
}

void PrefillNode::EngineStep() {
  const JobPtr job = queue_.front();
  if (job->n_local_done > 0) return queue_.pop_front();  // cancelled before or while it was computed
  if (job->kv == nullptr) {
    auto kv = SequenceKv::Create(*pool_, World::Formats().at(static_cast<std::size_t>(job->args.format)),
                                 job->args.n_prompt, 128);
    if (!kv.ok()) return;  // full until another transfer is over
    job->pool = pool_;
    job->kv = std::move(kv).value();
    job->local = BlockTable::Of(*job->kv, job->args.n_prompt, kModel, kPlan);
    job->extents = job->local.Extents();
  }
  if (!Compute(job)) return;
  if (!queue_.empty() && queue_.front() == job) queue_.pop_front();
  OnFirstToken(job);
}

void PrefillNode::Fill(const JobPtr& job, std::size_t block_idx) {
  const BlockExtent& extent = job->extents[block_idx];
  FillBlock(job->args.content, job->args.n_prompt, block_idx, memory_.subspan(extent.offset, extent.bytes));
}

bool PrefillNode::Compute(const JobPtr& job) {
  const BlockTable::Layer& layer = job->local.layer(job->layer);
  const Part part = PartOf(layer, job->args.rank, job->args.n_ranks, job->chunk);
  FinalBlocks final{job->layer, {part.packed}, part.sink, part.exact.begin, part.exact.end};
  const std::size_t n_packed = layer.blocks.n_packed();
  const std::size_t first_exact = layer.first_block + n_packed + (layer.blocks.sink.valid() ? 1 : 0);
  for (int b = part.packed.begin; b < part.packed.end; ++b) Fill(job, layer.first_block + static_cast<std::size_t>(b));
  if (part.sink) Fill(job, layer.first_block + n_packed);
  for (int b = part.exact.begin; b < part.exact.end; ++b) Fill(job, first_exact + static_cast<std::size_t>(b));
  if (++job->layer == job->local.n_layers()) {
    job->layer = 0;
    ++job->chunk;
  }
  job->computed = job->chunk == kChunks;
  auto actions = job->sender->OnBlocksReady(*job->kv, final, Now());
  Do(job, actions.ok() ? std::move(*actions) : job->sender->Cancel(actions.status(), Now()));
  return job->computed;
}

void PrefillNode::OnFirstToken(const JobPtr& job) {
  const PrefillArgs& args = job->args;
  const bool wanted = !job->sender->stopping() && !job->sender->ended();
  const int position = args.first_token_position >= 0 ? args.first_token_position : args.n_prompt;
  const std::int32_t token = TokenAt(args.content, position);
  if (wanted && args.rank == 0) {
    RpcEvent event;
    event.kind = RpcEvent::Kind::kFirstToken;
    event.token = token;
    event.last = args.first_token_is_last;
    job->call->Send(std::move(event));
  }
  if (args.rank != 0) return;
  if (args.first_token_is_last) {
    job->first_token_final = wanted;
    return Do(job, job->sender->Cancel(Cancelled("the first token ended the request"), Now()));
  }
  Do(job, job->sender->OnFirstToken({token, -0.5f, {}, 0, static_cast<std::uint32_t>(args.n_prompt)}, Now()));
}

// --- the sender's actions ---

void PrefillNode::Do(const JobPtr& job, SenderActions actions) {
  for (SenderAction& action : actions) {
    if (const auto* write = std::get_if<PostWrite>(&action)) {
      ++job->n_writes_open;
      transport_->Write(job->peer, job->sender->lease().tag(), write->local, write->remote_offset,
                        [this, job](const Status& status) {
                          --job->n_writes_open;
                          *job->link_progress_ns = Now();
                          Do(job, job->sender->OnWriteDone(status, Now()));
                        });
    } else if (std::holds_alternative<PostFlush>(action)) {
      transport_->Flush(job->peer, [this, job](const Status& status) {
        *job->link_progress_ns = Now();
        Do(job, job->sender->OnFlushDone(status, Now()));
      });
    } else if (const auto* post = std::get_if<PostMessage>(&action)) {
      transport_->Send(job->peer, post->message.type, AsBytes(post->message.payload), [](const Status&) {});
    } else if (std::holds_alternative<ClosePeer>(action)) {
      if (world_.logging()) world_.Log(name_ + " closes its connection to " + job->args.lease.decode);
      transport_->Close(job->peer, [this, peer = job->peer](const Status&) {
        OnPeerFailure(peer, Unavailable("it was silent and the connection has been closed"));
      });
    } else if (std::holds_alternative<LocalDone>(action)) {
      OnLocalDone(job);
    } else {
      OnEnded(job, std::get<SenderEnded>(action).status);
    }
  }
}

// The blocks go back at once; a write that still read them would carry poison.
void PrefillNode::OnLocalDone(const JobPtr& job) {
  if (++job->n_local_done > 1) world_.Failed("local bytes", "LocalDone twice");
  if (job->n_writes_open > 0) {
    world_.Failed("local bytes", "request " + std::to_string(job->args.request) + ": a write still reads them");
  }
  for (const BlockExtent& extent : job->extents) {
    const auto bytes = memory_.subspan(extent.offset, extent.bytes);
    std::fill(bytes.begin(), bytes.end(), kPoison);
  }
  job->kv.reset();
}

void PrefillNode::OnEnded(const JobPtr& job, const Status& status) {
  if (world_.logging()) {
    world_.Log(name_ + " transfer of request " + std::to_string(job->args.request) + " ended: " + status.ToString());
  }
  if (++job->n_ended > 1) world_.Failed("sender left", "SenderEnded twice");
  if (job->n_local_done != 1) world_.Failed("local bytes", "the sender ended before its bytes were free");
  if (status.ok() || job->first_token_final) job->call->Send({});
  job->call->End(job->first_token_final ? OkStatus() : status);
  Post(0, [this, key = Key{job->args.request, job->args.attempt}] { jobs_.erase(key); });
}

std::uint64_t PrefillNode::waiting_tokens() const {
  std::uint64_t n = 0;
  for (const JobPtr& job : queue_) n += static_cast<std::uint64_t>(job->args.n_prompt);
  return n;
}

std::string PrefillNode::WhatIsLeft() const {
  if (!jobs_.empty()) return "sender left: " + name_ + " " + std::to_string(jobs_.size());
  if (pool_->usage().n_blocks_used > 0) {
    return "blocks leaked: " + name_ + " " + std::to_string(pool_->usage().n_blocks_used);
  }
  return {};
}

// --- the transport ---

void PrefillNode::OnPeerUp(PeerId peer, const PeerInfo& info) {
  for (auto& [key, connection] : connections_) {
    if (connection.peer != peer) continue;
    connection.up = true;
    connection.info = info;
  }
  for (const JobPtr& job : JobsOf(peer)) Do(job, job->sender->OnPeerUp(info.delivery, Now()));
}

Status PrefillNode::OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) {
  ZEROC_ASSIGN_OR_RETURN(const Message message, ParseMessage(type, payload));
  for (const JobPtr& job : JobsOf(peer)) {
    if (!(job->sender->lease() == LeaseOf(message)) || job->sender->ended()) continue;
    Do(job, job->sender->OnMessage(message, Now()));
    return OkStatus();
  }
  if (const auto answer = AnswerWithoutSender(message)) {
    transport_->Send(peer, answer->type, AsBytes(answer->payload), [](const Status&) {});
  }
  return OkStatus();
}

void PrefillNode::OnProtocolError(PeerId, const Status& status) { world_.Failed("protocol error", status.ToString()); }

void PrefillNode::OnPeerFailure(PeerId peer, const Status& status) {
  std::erase_if(connections_, [peer](const auto& entry) { return entry.second.peer == peer; });
  for (const JobPtr& job : JobsOf(peer)) Do(job, job->sender->OnPeerFailure(status, Now()));
}

}  // namespace zeroc::simulation
