#include "tests/simulation/decode_node.h"

#include <algorithm>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/handoff/byte_codec.h"
#include "tests/simulation/world.h"

namespace zeroc::simulation {

using handoff_test::kModel;
using handoff_test::kPlan;

DecodeNode::DecodeNode(World& world, std::string name, std::span<std::byte> memory, std::uint64_t seed)
    : world_(world),
      name_(std::move(name)),
      arena_(memory),
      pool_(BlockPool::Create(memory, 64 << 10).value()),
      leases_(world.options().mistake, world.options().leases, seed) {
  std::fill(arena_.begin(), arena_.end(), kPoison);
  TransportOptions options;
  options.name = name_;
  options.piece_bytes = 4096;
  options.connect_timeout_ms = 2000;
  transport_ = world_.network().Create(options, *this).value();
  ZEROC_CHECK(transport_->RegisterArena(arena_).ok());
  Tick();
}

std::int64_t DecodeNode::Now() const { return world_.NowNs(name_); }
double DecodeNode::EngineDelay() { return world_.Random(0.003); }

void DecodeNode::Post(double delay, std::function<void()> work) {
  world_.network().At(delay, name_, [weak = std::weak_ptr<int>(life_), work = std::move(work)] {
    if (!weak.expired()) work();
  });
}

void DecodeNode::Tick() {
  world_.Heartbeat(name_);
  world_.report().n_quarantined += static_cast<int>(n_quarantined());
  Do(leases_.Tick(Now()));
  Post(0.1, [this] { Tick(); });
}

// --- calls ---

void DecodeNode::Reserve(std::uint64_t request, int n_prompt, int max_tokens, int format, const CallPtr& call) {
  Post(EngineDelay(), [=, this] {
    auto kv =
        SequenceKv::Create(*pool_, World::Formats().at(static_cast<std::size_t>(format)), n_prompt + max_tokens, 1);
    if (!kv.ok()) return call->End(kv.status());
    const BlockTable table = BlockTable::Of(**kv, n_prompt, kModel, kPlan);
    auto owned = std::make_shared<Request>();
    owned->id = request;
    owned->n_prompt = n_prompt;
    owned->pool = pool_;
    owned->kv = std::move(kv).value();
    owned->attended = AttendedKv(table);
    for (const BlockExtent& extent : owned->attended.extents()) CheckFree(extent, "reserved");
    owned->key = leases_.Create(table, Now()).value();
    requests_[owned->key.lease_id] = owned;
    RpcEvent event;
    event.kind = RpcEvent::Kind::kLease;
    event.lease = {owned->key, table.Serialise(), name_, transport_->LocalAddress(), transport_->LocalArena()};
    call->Send(std::move(event));
    call->End(OkStatus());
  });
}

DecodeNode::RequestPtr DecodeNode::Claim(const LeaseKey& key, std::uint64_t request, int max_tokens,
                                         const CallPtr& call) {
  const auto refuse = [&call](const Status& status) {
    call->End(status);
    return nullptr;
  };
  const auto it = requests_.find(key.lease_id);
  const auto failed = failed_.find(key.lease_id);
  if (failed != failed_.end()) return refuse(failed->second);
  if (it == requests_.end() || !(it->second->key == key)) return refuse(NotFound("no such lease, or it is over"));
  if (it->second->id != request) return refuse(FailedPrecondition("reserved for another request"));
  if (it->second->call != nullptr) return refuse(Status(StatusCode::kAlreadyExists, "another call waits"));
  it->second->call = call;
  it->second->max_tokens = max_tokens;
  call->on_cancel = [this, key, weak = std::weak_ptr<int>(life_)] {
    if (weak.expired()) return;
    if (const auto found = requests_.find(key.lease_id); found != requests_.end()) found->second->told = true;
    EndLease(key, Cancelled("the caller is gone"));
  };
  return it->second;
}

void DecodeNode::Generate(const LeaseKey& key, std::uint64_t request, int max_tokens, const CallPtr& call) {
  if (const RequestPtr claimed = Claim(key, request, max_tokens, call)) StartIfComplete(claimed);
}

void DecodeNode::GenerateLocally(const LeaseKey& key, std::uint64_t request, int max_tokens, const LocalPrompt& prompt,
                                 const CallPtr& call) {
  const RequestPtr claimed = Claim(key, request, max_tokens, call);
  if (claimed == nullptr) return;
  const Status admitted = leases_.AdmitLocal(key);
  if (!admitted.ok()) return EndLease(key, admitted);
  claimed->started = true;
  Post(world_.options().compute_seconds * prompt.n_prompt / 16, [this, claimed, prompt] {
    if (!claimed->over && !claimed->told) ComputeLocally(claimed, prompt);
  });
}

void DecodeNode::ComputeLocally(const RequestPtr& request, const LocalPrompt& prompt) {
  const std::vector<BlockExtent>& extents = request->attended.extents();
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (world_.options().mistake == Mistake::kLocalBlockNotComputed && i + 1 == extents.size()) break;
    FillBlock(prompt.content, prompt.n_prompt, i, arena_.subspan(extents[i].offset, extents[i].bytes));
  }
  RpcEvent event;
  event.kind = RpcEvent::Kind::kFirstToken;
  event.token = TokenAt(prompt.content, prompt.n_prompt);
  event.last = request->max_tokens == 1;
  request->call->Send(event);
  event.kind = RpcEvent::Kind::kAdmitted;
  request->call->Send(event);
  if (request->max_tokens > 1) return Step(request, 1);
  event.kind = RpcEvent::Kind::kFinal;
  request->call->Send(event);
  EndCall(request, OkStatus());
  EndLease(request->key, OkStatus());
}

void DecodeNode::StartIfComplete(const RequestPtr& request) {
  if (request->call == nullptr || !request->ready.has_value()) return;
  if (request->started && !leases_.may_start_again()) return;
  if (!leases_.Admit(request->key).ok()) return;
  request->started = true;
  Post(EngineDelay(), [this, request] {
    if (request->over) return;
    RpcEvent admitted;
    admitted.kind = RpcEvent::Kind::kAdmitted;
    request->call->Send(std::move(admitted));
    Step(request, 1);
  });
}

// The first n_generated tokens are out, prefill's included.
void DecodeNode::Step(const RequestPtr& request, int n_generated) {
  if (request->over || request->told || world_.failed()) return;
  RpcEvent event;
  event.kind = RpcEvent::Kind::kToken;
  event.token = request->attended.Step(arena_, request->n_prompt + n_generated);
  ++world_.report().n_steps_checked;
  request->call->Send(event);
  if (++n_generated < request->max_tokens) {
    return Post(world_.options().step_seconds * (0.5 + world_.Random(1)),
                [this, request, n_generated] { Step(request, n_generated); });
  }
  event.kind = RpcEvent::Kind::kFinal;
  request->call->Send(event);
  EndCall(request, OkStatus());
  EndLease(request->key, OkStatus());
}

void DecodeNode::EndCall(const RequestPtr& request, const Status& status) {
  request->told = true;
  if (request->call != nullptr) request->call->End(status);
}

void DecodeNode::EndLease(const LeaseKey& key, const Status& why) {
  const auto it = requests_.find(key.lease_id);
  if (it == requests_.end() || !(it->second->key == key)) return;
  if (!why.ok()) EndCall(it->second, why);
  Do(leases_.Release(key, why, Now()));
}

// --- the table's actions ---

void DecodeNode::Do(LeaseActions actions) {
  for (LeaseAction& action : actions) {
    if (auto* send = std::get_if<SendMessage>(&action)) {
      transport_->Send(send->peer, send->message.type, AsBytes(send->message.payload), [](const Status&) {});
    } else if (auto* verify = std::get_if<VerifyLease>(&action)) {
      Post(EngineDelay(), [this, one = std::move(*verify)] {
        const Status status = VerifyBlocks(arena_, one.blocks);
        if (!status.ok()) {
          ++world_.report().n_bad_checksums;
          if (world_.options().network.corrupt_probability == 0) world_.Failed("checksum", status.ToString());
        }
        Do(leases_.OnVerified(one.lease, status, Now()));
      });
    } else if (const auto* ready = std::get_if<LeaseReady>(&action)) {
      const auto it = requests_.find(ready->lease.lease_id);
      if (it == requests_.end()) continue;
      if (it->second->ready.has_value()) world_.Failed("admitted twice", "request " + std::to_string(it->second->id));
      it->second->ready = *ready;
      StartIfComplete(it->second);
    } else if (const auto* failed = std::get_if<LeaseFailed>(&action)) {
      OnFailed(*failed);
    } else {
      OnReturn(std::get<ReturnBlocks>(action).lease);
    }
  }
}

void DecodeNode::OnFailed(const LeaseFailed& failed) {
  const auto it = requests_.find(failed.lease.lease_id);
  if (it == requests_.end()) return;
  if (world_.logging()) {
    world_.Log(name_ + " lease of request " + std::to_string(it->second->id) + " failed: " + failed.status.ToString());
  }
  ++world_.report().n_lease_failures;
  if (failed.expired) ++world_.report().n_lease_expiries;
  failed_[failed.lease.lease_id] = failed.status;
  EndCall(it->second, failed.status);
}

void DecodeNode::OnReturn(const LeaseKey& key) {
  const auto node = requests_.extract(key.lease_id);
  if (node.empty()) return world_.Failed("returned twice", name_ + " lease " + std::to_string(key.lease_id));
  const RequestPtr request = node.mapped();
  if (world_.logging()) world_.Log(name_ + " blocks of request " + std::to_string(request->id) + " return");
  if (request->call != nullptr && !request->told) {
    world_.Failed("caller not told", name_ + " request " + std::to_string(request->id));
  }
  request->over = true;
  for (const BlockExtent& extent : request->attended.extents()) {
    const auto bytes = arena_.subspan(extent.offset, extent.bytes);
    std::fill(bytes.begin(), bytes.end(), kPoison);
  }
  Post(EngineDelay(), [request] { request->kv.reset(); });
}

// --- checks ---

void DecodeNode::CheckFree(const BlockExtent& extent, const char* when) {
  if (HoldsOnly(kPoison, arena_.subspan(extent.offset, extent.bytes))) return;
  world_.Failed("late write", name_ + " offset " + std::to_string(extent.offset) + ", seen when " + when);
}

void DecodeNode::CheckArena() { CheckFree({0, arena_.size()}, "the world ended"); }

std::string DecodeNode::WhatIsLeft() const {
  if (leases_.n_leases() > 0) return "leases left: " + name_ + " " + std::to_string(leases_.n_leases());
  if (pool_->usage().n_blocks_used > 0) {
    return "blocks leaked: " + name_ + " " + std::to_string(pool_->usage().n_blocks_used);
  }
  return {};
}

// --- the transport ---

bool DecodeNode::AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) {
  return leases_.AcceptWrite(peer, tag, offset, bytes, Now());
}
void DecodeNode::OnWriteDone(PeerId, const WriteTag& tag, std::uint64_t, std::uint64_t bytes, const Status& status) {
  Do(leases_.OnWriteDone(tag, bytes, status, Now()));
}
Status DecodeNode::OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) {
  ZEROC_ASSIGN_OR_RETURN(const Message message, ParseMessage(type, payload));
  ZEROC_ASSIGN_OR_RETURN(LeaseActions actions, leases_.OnMessage(peer, message, Now()));
  Do(std::move(actions));
  return OkStatus();
}
void DecodeNode::OnProtocolError(PeerId, const Status& status) { world_.Failed("protocol error", status.ToString()); }
void DecodeNode::OnPeerFailure(PeerId peer, const Status& status) {
  if (world_.logging()) world_.Log(name_ + " lost a writer: " + status.ToString());
  Do(leases_.OnPeerFailure(peer, status, Now()));
}

}  // namespace zeroc::simulation
