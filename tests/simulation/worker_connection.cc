#include "tests/simulation/worker_connection.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "tests/simulation/decode_node.h"
#include "tests/simulation/model.h"
#include "tests/simulation/prefill_node.h"
#include "tests/simulation/router_node.h"
#include "tests/simulation/virtual_timers.h"
#include "tests/simulation/world.h"

namespace zeroc::simulation {
namespace {

constexpr double kRankPatience = 1;  // for rank 0 to explain another rank's failure
constexpr double kRankWatch = 0.5;

std::uint64_t RequestOf(const std::string& request_id) { return std::stoull(request_id); }
int FormatOf(const std::string& profile) { return std::stoi(profile.substr(1)); }

v1::Lease ToProto(const GrantedLease& lease) {
  v1::Lease proto;
  proto.set_lease_id(lease.key.lease_id);
  proto.set_generation(lease.key.generation);
  proto.set_kv_layout(lease.layout);
  proto.set_transport_address(lease.address.bytes);
  proto.set_arena_key(lease.arena.key);
  proto.set_arena_base(lease.arena.base);
  proto.set_arena_bytes(lease.arena.bytes);
  return proto;
}

GrantedLease FromProto(const v1::Lease& lease, const std::string& decode) {
  GrantedLease granted;
  granted.key = {lease.lease_id(), lease.generation()};
  granted.layout = lease.kv_layout();
  granted.decode = decode;
  granted.address.bytes = lease.transport_address();
  granted.arena = {lease.arena_key(), lease.arena_base(), lease.arena_bytes()};
  return granted;
}

// One rank of a prefill group for each simulated call; the router sees the group as one worker.
class Group : public WorkerCall, public std::enable_shared_from_this<Group> {
 public:
  Group(std::shared_ptr<RouterLife> life, OnEvent<v1::PrefillEvent> on_event, StreamDone done)
      : life_(std::move(life)), on_event_(std::move(on_event)), done_(std::move(done)) {}

  void Start(const std::vector<std::string>& workers, PrefillArgs args) {
    args.n_ranks = static_cast<std::uint16_t>(workers.size());
    for (std::uint16_t rank = 0; rank < args.n_ranks; ++rank) {
      args.rank = rank;
      const CallPtr call = life_->world.NewCall(workers[rank]);
      call->on_event = [self = shared_from_this()](const RpcEvent& event) { self->OnRankEvent(event); };
      call->on_done = [self = shared_from_this(), rank](const Status& status) { self->OnRankDone(rank, status); };
      calls_.push_back(call);
      call->Start([&world = life_->world, name = workers[rank], args, call] {
        if (PrefillNode* node = world.prefill(name)) node->Run(args, call);
      });
    }
    Watch();
  }
  void Cancel() override {
    life_->world.network().At(0, {}, [self = shared_from_this()] { self->End(Cancelled("cancelled")); });
    for (const CallPtr& call : calls_) call->Cancel();
  }

 private:
  void OnRankEvent(const RpcEvent& event) {
    if (over_ || event.kind != RpcEvent::Kind::kFirstToken) return;
    v1::PrefillEvent first;
    first.mutable_first_token()->set_id(static_cast<std::uint32_t>(event.token));
    last_ = event.last;
    if (last_) first.mutable_first_token()->set_finish_reason(v1::FINISH_REASON_LENGTH);
    on_event_(first);
  }
  // Rank 0, which may have ended the lease because its token was the last, has its say first.
  void OnRankDone(std::uint16_t rank, const Status& status) {
    if (over_) return;
    if (status.ok() && ++n_ended_ < static_cast<int>(calls_.size()) && !(rank == 0 && last_)) return;
    if (!status.ok() && rank > 0) {
      return life_->world.network().At(kRankPatience, {}, [self = shared_from_this(), status] { self->End(status); });
    }
    if (status.ok()) {
      v1::PrefillEvent done;
      done.mutable_done();
      on_event_(done);
    }
    End(status);
  }
  void End(const Status& status) {
    if (std::exchange(over_, true)) return;
    for (const CallPtr& call : calls_) call->Cancel();
    if (!life_->over) done_(status);
  }
  // The leader's eyes: a rank that stands still is lost to the group.
  void Watch() {
    if (over_) return;
    const bool lost = std::any_of(calls_.begin() + 1, calls_.end(),
                                  [&](const CallPtr& call) { return !life_->world.Alive(call->worker()); });
    if (lost) return End(Unavailable("a rank of the group was lost"));
    life_->world.network().At(kRankWatch, {}, [self = shared_from_this()] { self->Watch(); });
  }

  const std::shared_ptr<RouterLife> life_;
  const OnEvent<v1::PrefillEvent> on_event_;
  const StreamDone done_;
  std::vector<CallPtr> calls_;  // [rank]
  int n_ended_ = 0;             // well
  bool last_ = false;           // the first token ended the request
  bool over_ = false;
};

class Connection final : public WorkerConnection, public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<RouterLife> life, std::string worker)
      : life_(std::move(life)), world_(life_->world), worker_(std::move(worker)) {}

  void CheckHealth(Deadline, std::function<void(const Status&)> done) override {
    world_.network().At(0, {}, [done = std::move(done)] { done(OkStatus()); });
  }

  std::shared_ptr<WorkerCall> Reserve(const v1::ReserveRequest& request, Deadline deadline,
                                      UnaryDone<v1::ReserveResponse> done) override {
    const std::uint64_t id = RequestOf(request.request_id());
    ++world_.report().n_attempts;
    const auto granted = std::make_shared<v1::ReserveResponse>();
    const CallPtr call = NewCall();
    call->on_event = [granted](const RpcEvent& event) { *granted->mutable_lease() = ToProto(event.lease); };
    call->on_done = [this, self = shared_from_this(), life = life_, id, granted, done](const Status& status) {
      if (life->over) return done(Unavailable("the router was lost"), {});
      if (status.code() == StatusCode::kResourceExhausted) {
        ++world_.report().n_refused;
      } else if (!status.ok()) {
        life->router.AttemptLost(id, status.ToString());
      }
      done(status, *granted);
    };
    const int n_prompt = static_cast<int>(request.n_prompt_tokens()),
              max_tokens = static_cast<int>(request.max_tokens());
    call->Start(
        [this, self = shared_from_this(), id, n_prompt, max_tokens, format = FormatOf(request.profile()), call] {
          if (DecodeNode* node = world_.decode(worker_)) node->Reserve(id, n_prompt, max_tokens, format, call);
        });
    world_.network().At(life_->timers.Until(deadline), {},
                        [call] { call->Break(DeadlineExceeded("no answer to Reserve")); });
    return std::make_shared<OneCall>(world_, call, nullptr);
  }

  std::shared_ptr<WorkerCall> Generate(const v1::DecodeRequest& request, Deadline, OnEvent<v1::DecodeEvent> on_event,
                                       StreamDone done) override {
    const std::uint64_t id = RequestOf(request.request_id());
    if (request.n_streamed() > 0) ++world_.report().n_migrations;
    const CallPtr call = NewCall();
    const bool twice = world_.options().mistake == Mistake::kRepeatDecodeTokens;
    call->on_event = [on_event = std::move(on_event), twice](const RpcEvent& event) {
      const v1::DecodeEvent proto = ToProtoEvent(event);
      on_event(proto);
      if (twice && proto.has_tokens()) on_event(proto);
    };
    call->on_done = done;
    std::optional<LocalPrompt> local;
    if (request.local_prefill()) {
      CheckPrompt(id, request.prompt_ids(), request.n_streamed());
      ++world_.report().n_local;
      local = LocalPrompt{ContentOf(world_, id), static_cast<int>(request.n_prompt_tokens())};
    }
    const LeaseKey key{request.lease_id(), request.generation()};
    const int max_tokens = static_cast<int>(request.sampling().max_tokens());
    call->Start([this, self = shared_from_this(), key, id, max_tokens, local, call] {
      DecodeNode* node = world_.decode(worker_);
      if (node == nullptr) return;
      if (local.has_value()) return node->GenerateLocally(key, id, max_tokens, *local, call);
      node->Generate(key, id, max_tokens, call);
    });
    return std::make_shared<OneCall>(world_, call, std::move(done));
  }

  void Release(const v1::ReleaseRequest& request, Deadline, StreamDone done) override {
    const std::uint64_t id = RequestOf(request.request_id());
    if (request.reason() == "lost") life_->router.AttemptLost(id, "the router gives its lease back as lost");
    if (life_->over) return;
    const CallPtr call = NewCall();
    call->on_done = std::move(done);
    call->Start([this, self = shared_from_this(), key = LeaseKey{request.lease_id(), request.generation()}, call] {
      if (DecodeNode* node = world_.decode(worker_)) node->Release(key);
      call->End(OkStatus());
    });
  }

  std::shared_ptr<WorkerCall> Prefill(const v1::PrefillRequest& request, Deadline, OnEvent<v1::PrefillEvent> on_event,
                                      StreamDone done) override {
    const std::uint64_t id = RequestOf(request.request_id());
    int n_streamed = static_cast<int>(request.n_streamed());
    CheckPrompt(id, request.token_ids(), request.n_streamed());
    PrefillArgs args;
    args.request = id;
    args.attempt = request.attempt();
    args.content = ContentOf(world_, id);
    args.n_prompt = request.token_ids_size();
    args.format = FormatOf(request.profile());
    args.first_token_is_last = request.sampling().max_tokens() == 1;
    args.lease = FromProto(request.lease(), request.decode_worker());
    if (world_.options().mistake == Mistake::kRepeatStreamedTokens)
      args.first_token_position = args.n_prompt - n_streamed;
    const auto group = std::make_shared<Group>(life_, std::move(on_event), std::move(done));
    group->Start(Ranks(id), args);
    return group;
  }

 private:
  // A call of one rank, whose end is told also after Cancel.
  class OneCall : public WorkerCall {
   public:
    OneCall(World& world, CallPtr call, StreamDone done)
        : world_(world), call_(std::move(call)), done_(std::move(done)) {}
    void Cancel() override {
      if (call_->over()) return;
      call_->Cancel();
      if (done_) world_.network().At(0, {}, [done = done_] { done(Cancelled("cancelled")); });
    }

   private:
    World& world_;
    const CallPtr call_;
    const StreamDone done_;
  };

  static v1::DecodeEvent ToProtoEvent(const RpcEvent& event) {
    v1::DecodeEvent proto;
    switch (event.kind) {
      case RpcEvent::Kind::kFirstToken:
        proto.mutable_first_token()->set_id(static_cast<std::uint32_t>(event.token));
        if (event.last) proto.mutable_first_token()->set_finish_reason(v1::FINISH_REASON_LENGTH);
        break;
      case RpcEvent::Kind::kAdmitted:
        proto.mutable_admitted();
        break;
      case RpcEvent::Kind::kToken:
        proto.mutable_tokens()->add_ids(static_cast<std::uint32_t>(event.token));
        break;
      default:
        proto.mutable_final()->set_finish_reason(v1::FINISH_REASON_LENGTH);
        break;
    }
    return proto;
  }

  CallPtr NewCall() const { return world_.NewCall(worker_); }

  // The workers of a group: this one leads, the others are any that live.
  std::vector<std::string> Ranks(std::uint64_t id) const {
    std::vector<std::string> ranks;
    for (const std::string& name : world_.Names(false)) {
      if (name != worker_ && world_.Alive(name)) ranks.push_back(name);
    }
    std::shuffle(ranks.begin(), ranks.end(), world_.rng());
    const RequestSpec* spec = life_->router.spec(id);
    ranks.resize(std::min(ranks.size(), static_cast<std::size_t>(spec->n_ranks - 1)));
    ranks.insert(ranks.begin(), worker_);
    return ranks;
  }

  // The request's prompt, and behind it what its client has.
  template <typename Ids>
  void CheckPrompt(std::uint64_t id, const Ids& ids, std::uint32_t n_streamed) const {
    const RequestSpec* spec = life_->router.spec(id);
    bool right = ids.size() == spec->n_prompt + static_cast<int>(n_streamed);
    for (int i = 0; right && i < ids.size(); ++i) {
      right = ids[i] == static_cast<std::uint32_t>(TokenAt(ContentOf(world_, id), i));
    }
    if (!right) world_.Failed("wrong prompt", "request " + std::to_string(id));
  }

  const std::shared_ptr<RouterLife> life_;
  World& world_;
  const std::string worker_;
};

}  // namespace

std::string ProfileOf(int format) {
  std::string name("f");
  name += std::to_string(format);
  return name;
}

std::shared_ptr<WorkerConnection> Connect(std::shared_ptr<RouterLife> life, std::string worker) {
  return std::make_shared<Connection>(std::move(life), std::move(worker));
}

}  // namespace zeroc::simulation
