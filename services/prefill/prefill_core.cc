#include "services/prefill/prefill_core.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "libzeroc/compression/prefix_hash.h"
#include "libzeroc/handoff/byte_codec.h"
#include "services/common/logging.h"
#include "services/prefill/prefill_request.h"
#include "services/worker/proto_convert.h"

namespace zeroc {
namespace {

constexpr std::chrono::milliseconds kTick(100);

std::string ConnectionKey(const v1::Lease& lease) {
  // A worker that restarted on the same address has another arena and needs another connection.
  return std::to_string(lease.transport_address().size()) + ":" + lease.transport_address() + lease.arena_key() + ":" +
         std::to_string(lease.arena_base());
}

// Of the listed blocks, those that a rank writes.
std::uint32_t CountBlocks(const BlockTable& table, const SpSplit& split, int rank) {
  std::uint32_t n = 0;
  for (const BlockRange& range : split.Blocks(rank)) {
    n += static_cast<std::uint32_t>(std::max(0, range.end - std::max(range.begin, table.n_present())));
  }
  n *= static_cast<std::uint32_t>(table.n_layers());
  const bool has_first = rank == split.OwnerOf(0);
  for (int layer = 0; has_first && layer < table.n_layers(); ++layer) {
    if (table.layer(layer).blocks.sink.valid()) ++n;
  }
  return n;
}

}  // namespace

// --- start and end ---

Result<std::unique_ptr<PrefillCore>> PrefillCore::Create(const Options& options, WorkerModel& model, Metrics& metrics,
                                                         const TransportFactory& transport) {
  std::unique_ptr<PrefillCore> core(new PrefillCore(options, model, metrics));
  ZEROC_RETURN_IF_ERROR(core->Open(transport));
  return core;
}

Status PrefillCore::Open(const TransportFactory& transport) {
  memory_bytes_ = options_.kv_bytes;
  memory_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, memory_bytes_)));
  if (memory_ == nullptr) return ResourceExhausted("no " + std::to_string(memory_bytes_ >> 20) + " MiB of KV memory");
  ZEROC_ASSIGN_OR_RETURN(
      pool_, OwnedPool::Over({memory_.get(), memory_bytes_}, model_.SlabBytes(), model_.model().kv_memory()));
  ZEROC_ASSIGN_OR_RETURN(transport_, transport(*this));
  if (options_.prefix_cache_share > 0) {
    cache_ = std::make_unique<PrefixCache>(pool_->pool(), model_.fingerprint(), model_.plan_id(),
                                           PrefixCache::Options{options_.prefix_cache_share});
  }
  engine_ = std::make_unique<PrefillEngine>(
      model_.model(), pool_->pool(), PrefillEngine::Options{options_.chunk_tokens, options_.queue_max}, cache_.get());
  member_ = std::make_unique<GroupMember>(transport);
  if (!options_.group.followers.empty()) {
    metrics_.AddSpBytes(SpSchemeName(SpScheme::kAllGather), 0);  // on the page from now on
    ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<CommPort> port, CommPort::Open(transport, {}));
    group_ = std::make_unique<PrefillGroup>(options_.group, options_.name, model_.fingerprint(), model_.plan_id(),
                                            std::move(port));
  }
  engine_thread_ = std::make_unique<EngineThread>("prefill", [this] {
    // Shares and everything else take turns while there is both.
    bool busy = !share_had_turn_ && StepShare();
    share_had_turn_ = busy;
    if (!busy && engine_->Step(PrefillNowNs())) {
      metrics_.ObserveIterationTokens(engine_->last_step_tokens());
      busy = true;
    }
    if (!busy) busy = StepShare();
    PublishUsage();
    return busy;
  });
  timers_ = std::make_unique<TimerThread>();
  ScheduleTick();
  return OkStatus();
}

PrefillCore::~PrefillCore() {
  timers_.reset();
  // The engine's thread may be waiting for other ranks.
  if (group_ != nullptr) group_->Stop();
  if (member_ != nullptr) member_->Stop();
  if (engine_thread_ != nullptr) engine_thread_->Stop();  // what the transport still posts is dropped
  shares_.clear();                                        // and their communicators, before the ports
}

void PrefillCore::ScheduleTick() {
  timers_->Schedule(TimerThread::Clock::now() + kTick, [this] {
    for (const RequestPtr& request : RequestsOf(PeerId::kNone)) {
      request->Drive([&request](Sender& sender, std::int64_t now) {
        return sender.Tick(now, request->link_progress_ns->load(std::memory_order_relaxed));
      });
    }
    engine_thread_->Post([this] { engine_->DropLate(PrefillNowNs()); });
    ScheduleTick();
  });
}

void PrefillCore::PublishUsage() {
  const BlockPool::Usage now = pool_->pool().usage();
  bytes_used_ = now.bytes_used;
  blocks_used_ = now.n_blocks_used;
  n_waiting_ = engine_->n_queued() + static_cast<int>(shares_.size());
  std::int64_t share_tokens = 0;
  for (const Share& share : shares_) share_tokens += std::ssize(share.job.tokens) / share.place.n_ranks;
  waiting_tokens_ = engine_->waiting_tokens() + share_tokens;
  if (cache_ != nullptr) hints_.Publish(*cache_, PrefixCache::Use::kResume, options_.chunk_tokens);
}

// --- Run ---

Result<PrefillCore::RequestPtr> PrefillCore::MakeRequest(const v1::PrefillRequest& request, Sink sink,
                                                         const Place& place) const {
  if (draining_) return Unavailable("the prefill worker is stopping");
  ZEROC_ASSIGN_OR_RETURN(const std::shared_ptr<const KvFormat> format,
                         model_.FormatFor(request.model_fingerprint(), request.plan_id(), request.profile()));
  ZEROC_ASSIGN_OR_RETURN(BlockTable table, BlockTable::Parse(AsBytes(request.lease().kv_layout())));
  const KvIdentity ours{model_.fingerprint(), model_.plan_id(), format->profile, format->layout_hash};
  if (!(table.identity() == ours)) {
    return FailedPrecondition("the lease of decode worker " + EscapeControls(request.decode_worker()) +
                              " is for another model, plan, profile or KV layout than this worker's");
  }
  if (table.n_prompt_tokens() != request.token_ids_size()) {
    return InvalidArgument("the lease holds " + std::to_string(table.n_prompt_tokens()) + " tokens, the prompt has " +
                           std::to_string(request.token_ids_size()));
  }
  if (request.n_streamed() >= static_cast<std::uint32_t>(request.token_ids_size())) {
    return InvalidArgument("n_streamed " + std::to_string(request.n_streamed()) + " leaves nothing of a prompt of " +
                           std::to_string(request.token_ids_size()) + " tokens");
  }
  if (request.n_cached_tokens() != 0 &&
      request.n_cached_tokens() != static_cast<std::uint32_t>(table.n_present_tokens())) {
    return InvalidArgument("n_cached_tokens is " + std::to_string(request.n_cached_tokens()) +
                           ", the lease calls the first " + std::to_string(table.n_present_tokens()) +
                           " tokens present");
  }
  if (table.prompt_hash() != 0 && table.prompt_hash() != PromptHash(IdsFromProto(request.token_ids()))) {
    return FailedPrecondition("the lease of decode worker " + EscapeControls(request.decode_worker()) +
                              " was reserved for another prompt");
  }
  ZEROC_RETURN_IF_ERROR(table.CheckPlaces(request.lease().arena_bytes()));
  ZEROC_ASSIGN_OR_RETURN(SamplingParams sampling, SamplingFromProto(request.sampling()));
  const SpSplit split(table.n_prompt_tokens(), place.n_ranks);
  const Sender::Share share{static_cast<std::uint16_t>(place.rank), static_cast<std::uint16_t>(place.n_ranks),
                            CountBlocks(table, split, place.rank)};
  const LeaseKey lease{request.lease().lease_id(), request.lease().generation()};
  Sender::Options options = options_.sender;
  if (request.lease().expiry_ms() > 0 && request.lease().expiry_ms() < 86'400'000) {
    const auto expiry_ns = static_cast<std::int64_t>(request.lease().expiry_ms()) * 1'000'000;
    options.heartbeat_ns = std::min(options.heartbeat_ns, std::max<std::int64_t>(expiry_ns / 3, 1));
  }
  auto& core = const_cast<PrefillCore&>(*this);
  auto made = std::make_shared<Request>(core, Key{request.request_id(), request.attempt()}, std::move(sink),
                                        Sender(options, lease, share, std::move(table), request.decode_worker()));
  made->decode_worker = request.decode_worker();
  made->sampling = std::move(sampling);
  made->n_prompt_tokens = request.token_ids_size();
  made->arrived_ns = PrefillNowNs();
  made->rank = place.rank;
  made->n_ranks = place.n_ranks;
  return made;
}

// Takes the request into the table with its connection, so that no event of the peer can pass between the two.
Status PrefillCore::Connect(const v1::PrefillRequest& request, const RequestPtr& added, Connection* connection) {
  const v1::Lease& lease = request.lease();
  MutexLock lock(mu_);
  if (requests_.contains(added->key)) {
    return Status(StatusCode::kAlreadyExists, "request " + EscapeControls(added->key.first) + " attempt " +
                                                  std::to_string(added->key.second) + " is running already");
  }
  Connection& cached = connections_[ConnectionKey(lease)];
  if (cached.peer == PeerId::kNone) {
    Result<PeerId> peer =
        transport_->Connect({lease.transport_address()}, {lease.arena_key(), lease.arena_base(), lease.arena_bytes()},
                            request.decode_worker().substr(0, kPeerNameBytesMax));
    if (!peer.ok()) {
      connections_.erase(ConnectionKey(lease));
      return peer.status().WithContext("decode worker " + EscapeControls(request.decode_worker()));
    }
    cached.peer = *peer;
  }
  added->peer = cached.peer;
  added->link_progress_ns = cached.progress_ns;
  requests_[added->key] = added;
  *connection = cached;
  return OkStatus();
}

PrefillJob PrefillCore::JobOf(const v1::PrefillRequest& request, const RequestPtr& added,
                              std::int64_t deadline_ns) const {
  PrefillJob job;
  job.tokens = IdsFromProto(request.token_ids());
  job.sampling = added->sampling;
  job.format = model_.formats().at(request.profile());
  job.listener = added.get();
  job.n_streamed = static_cast<int>(request.n_streamed());
  job.priority = request.priority();
  job.deadline_ns = deadline_ns;
  return job;
}

void PrefillCore::Run(const v1::PrefillRequest& request, Sink sink, std::int64_t deadline_ns) {
  const bool shared = request.sp_ranks() > 1;
  Place place;
  SpOptions options;
  if (shared) {
    Result<SpOptions> made = OptionsForLeader(request);
    if (!made.ok()) return sink->End(made.status());
    options = *made;
    place.n_ranks = group_->size();
  }
  Result<RequestPtr> made = MakeRequest(request, sink, place);
  if (!made.ok()) return sink->End(made.status());
  const RequestPtr added = *made;
  Connection connection;
  if (Status status = Connect(request, added, &connection); !status.ok()) return sink->End(status);
  if (connection.up) OnPeerUp(connection.peer, connection.info);

  PrefillJob job = JobOf(request, added, deadline_ns);
  if (shared) return AddShare({added, std::move(job), options, place, request, 0, nullptr});
  const bool posted =
      engine_thread_->Post([this, added, job = std::move(job)]() mutable { SubmitOnEngine(added, std::move(job)); });
  if (!posted) Cancel(added->key, Unavailable("the prefill worker is stopping"));
}

void PrefillCore::SubmitOnEngine(const RequestPtr& request, PrefillJob job) {
  if (request->released) return;  // cancelled before it came here
  const Result<PrefillJobId> id = engine_->Submit(std::move(job));
  if (!id.ok()) return request->OnFailed(id.status());
  request->submitted = true;
  request->job = *id;
  PublishUsage();
}

// No write reads the KV any more. The request stays alive until the engine has let go of it.
void PrefillCore::OnLocalDone(const RequestPtr& request) {
  engine_thread_->Post([this, request] {
    request->released = true;
    if (request->submitted) engine_->Release(request->job);
    request->shared.reset();
    PublishUsage();
  });
}

void PrefillCore::OnEnded(const RequestPtr& request) {
  // Called with the request's mutex held, so the table is cleaned elsewhere.
  engine_thread_->Post([this, request] {
    MutexLock lock(mu_);
    requests_.erase(request->key);
  });
}

void PrefillCore::Cancel(const Key& key, const Status& why) {
  RequestPtr request;
  {
    MutexLock lock(mu_);
    const auto it = requests_.find(key);
    if (it == requests_.end()) return;
    request = it->second;
  }
  request->Drive([&why](Sender& sender, std::int64_t now) { return sender.Cancel(why, now); });
}

void PrefillCore::CancelAll(const Status& why) {
  for (const RequestPtr& request : RequestsOf(PeerId::kNone)) Cancel(request->key, why);
}

std::vector<PrefillCore::RequestPtr> PrefillCore::RequestsOf(PeerId peer) const {
  std::vector<RequestPtr> found;
  MutexLock lock(mu_);
  for (const auto& [key, request] : requests_) {
    if (peer == PeerId::kNone || request->peer == peer) found.push_back(request);
  }
  return found;
}

PrefillCore::RequestPtr PrefillCore::FindByLease(const LeaseKey& key) const {
  for (const RequestPtr& request : RequestsOf(PeerId::kNone)) {
    MutexLock lock(request->mu);
    if (request->sender.lease() == key && !request->sender.ended()) return request;
  }
  return nullptr;
}

// --- the transport's thread ---

void PrefillCore::OnPeerUp(PeerId peer, const PeerInfo& info) {
  bool news = false;
  {
    MutexLock lock(mu_);
    for (auto& [key, connection] : connections_) {
      if (connection.peer != peer) continue;
      news = !connection.up;
      connection.up = true;
      connection.info = info;
    }
  }
  if (news) {
    LogInfo("KV peer up name=" + EscapeControls(info.name) + " transport=\"" + EscapeControls(info.description) + "\"");
  }
  for (const RequestPtr& request : RequestsOf(peer)) {
    MutexLock lock(request->mu);
    request->transport = info.description;
    request->Do(request->sender.OnPeerUp(info.delivery, PrefillNowNs()));
  }
}

Status PrefillCore::OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) {
  ZEROC_ASSIGN_OR_RETURN(const Message message, ParseMessage(type, payload));
  const RequestPtr request = FindByLease(LeaseOf(message));
  if (request != nullptr && request->peer == peer) {
    request->Drive([&message](Sender& sender, std::int64_t now) { return sender.OnMessage(message, now); });
  } else if (const auto answer = AnswerWithoutSender(message)) {
    transport_->Send(peer, answer->type, AsBytes(answer->payload), [](const Status&) {});
  }
  return OkStatus();
}

void PrefillCore::OnProtocolError(PeerId, const Status& status) {
  LogWarning("KV transport: dropped a malformed frame: " + EscapeControls(status.ToString()));
}

void PrefillCore::ForgetConnection(PeerId peer) {
  MutexLock lock(mu_);
  std::erase_if(connections_, [peer](const auto& entry) { return entry.second.peer == peer; });
}

void PrefillCore::OnPeerFailure(PeerId peer, const Status& status) {
  ForgetConnection(peer);
  LogWarning("KV peer down: " + EscapeControls(status.ToString()));
  for (const RequestPtr& request : RequestsOf(peer)) {
    request->Drive([&status](Sender& sender, std::int64_t now) { return sender.OnPeerFailure(status, now); });
  }
}

void PrefillCore::ClosePeers() {
  std::vector<PeerId> peers;
  {
    MutexLock lock(mu_);
    for (const auto& [key, connection] : connections_) peers.push_back(connection.peer);
  }
  for (const PeerId peer : peers) {
    transport_->Close(peer, [this, peer](const Status&) { OnPeerFailure(peer, Unavailable("closed")); });
  }
}

// --- what others see ---

BlockPool::Usage PrefillCore::usage() const {
  BlockPool::Usage usage;
  usage.bytes_total = memory_bytes_ / model_.SlabBytes() * model_.SlabBytes();
  usage.bytes_used = bytes_used_;
  usage.n_blocks_used = blocks_used_;
  return usage;
}

std::size_t PrefillCore::in_flight() const {
  MutexLock lock(mu_);
  return requests_.size();
}

void PrefillCore::FillLoad(v1::WorkerLoad* load) const {
  const std::size_t all = in_flight();
  const int waiting = n_waiting_;
  load->set_waiting(static_cast<std::uint32_t>(waiting));
  load->set_running(static_cast<std::uint32_t>(all - std::min<std::size_t>(all, static_cast<std::size_t>(waiting))));
  load->set_waiting_tokens(static_cast<std::uint64_t>(std::max<std::int64_t>(0, waiting_tokens_)));
  load->set_draining(draining_);
  load->set_sp_ranks(group_ == nullptr ? 1 : static_cast<std::uint32_t>(group_->ready_ranks()));
  hints_.FillLoad(load);
}

void PrefillCore::UpdateGauges(Metrics& metrics) const {
  if (cache_ != nullptr) hints_.UpdateGauges(metrics);
  v1::WorkerLoad load;
  FillLoad(&load);
  const BlockPool::Usage now = usage();
  metrics.SetRequestsRunning(load.running());
  metrics.SetRequestsWaiting(load.waiting());
  metrics.SetPrefillBacklog(static_cast<double>(load.waiting_tokens()));
  metrics.SetKvCacheUsage(
      now.bytes_total == 0 ? 0 : static_cast<double>(now.bytes_used) / static_cast<double>(now.bytes_total));
  metrics.SetKvBlocks("used", static_cast<double>(now.n_blocks_used));
  const KvFormat& any = *model_.formats().begin()->second;
  metrics.SetKvBlocks("free", static_cast<double>((now.bytes_total - std::min(now.bytes_total, now.bytes_used)) /
                                                  static_cast<std::uint64_t>(any.exact.block_bytes)));
}

std::string PrefillCore::Describe() const {
  return "kv_memory_mib=" + std::to_string(memory_bytes_ >> 20) +
         " chunk_tokens=" + std::to_string(options_.chunk_tokens) + " queue_max=" + std::to_string(options_.queue_max) +
         " prefix_cache_share=" + std::to_string(options_.prefix_cache_share) +
         " group_ranks=" + std::to_string(group_ == nullptr ? 1 : group_->size()) +
         " sp_scheme=" + std::string(SpSchemeName(options_.group.scheme));
}

}  // namespace zeroc
