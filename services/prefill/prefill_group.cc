#include "services/prefill/prefill_group.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <random>
#include <utility>

#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

// Of a call that only asks whether a follower is there; a stop of the leader waits for it.
constexpr std::chrono::milliseconds kJoinTimeout(2'000);

std::uint64_t NewEpoch() {
  std::random_device device;
  const std::uint64_t epoch = std::uint64_t{device()} << 32 | device();
  return epoch == 0 ? 1 : epoch;
}

void SetDeadline(grpc::ClientContext& context, std::chrono::milliseconds timeout) {
  context.set_deadline(std::chrono::system_clock::now() + timeout);
}

}  // namespace

struct PrefillGroup::Follower {
  std::string address;
  std::unique_ptr<v1::Prefill::Stub> stub;
  // Of this epoch.
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<grpc::ClientReader<v1::GroupEvent>> events;
  std::thread reader;
};

// --- the leader ---

PrefillGroup::PrefillGroup(const PrefillGroupOptions& options, std::string name, std::string model_fingerprint,
                           std::string plan_id, std::unique_ptr<CommPort> port)
    : options_(options),
      name_(std::move(name)),
      model_fingerprint_(std::move(model_fingerprint)),
      plan_id_(std::move(plan_id)),
      port_(std::move(port)) {
  for (const std::string& address : options_.followers) {
    followers_.push_back(std::make_unique<Follower>());
    followers_.back()->address = address;
    followers_.back()->stub = v1::Prefill::NewStub(MakeGrpcChannel(address, GrpcLimits(), options_.security));
  }
  manager_ = std::thread([this] { Manage(); });
}

PrefillGroup::~PrefillGroup() { Stop(); }

void PrefillGroup::Stop() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  Break(Unavailable("the leader of the prefill group is stopping"));
  if (manager_.joinable()) manager_.join();
}

void PrefillGroup::Manage() {
  std::string last_message;
  for (;;) {
    Status status = Form();
    if (status.ok()) {
      last_message.clear();
      LogInfo("prefill group formed ranks=" + std::to_string(size()));
      MutexLock lock(mu_);
      ready_ = broken_.ok();
      while (broken_.ok() && !stopping_) changed_.Wait(mu_);
      ready_ = false;
      status = broken_;
      // The leader's request shall hear of the cause, not from decode that followers have left because of it.
      const auto until = std::chrono::steady_clock::now() + options_.patience;
      while (computing_ && !stopping_ && changed_.WaitUntil(mu_, until)) {
      }
    }
    Dissolve();
    // A follower that is away for long is told of once.
    if (!status.ok() && status.ToString() != last_message) {
      last_message = status.ToString();
      LogWarning("prefill group ended: " + EscapeControls(last_message));
    }
    MutexLock lock(mu_);
    const auto until = std::chrono::steady_clock::now() + options_.retry;
    while (!stopping_ && changed_.WaitUntil(mu_, until)) {
    }
    if (stopping_) return;
  }
}

Status PrefillGroup::Form() {
  v1::ServeGroupRequest serve;
  serve.set_epoch(NewEpoch());
  serve.set_leader(name_);
  std::vector<CommMember> members = {{port_->address(), name_}};
  for (const auto& follower : followers_) {
    grpc::ClientContext context;
    SetDeadline(context, std::min(options_.patience, kJoinTimeout));
    v1::JoinGroupRequest request;
    request.set_model_fingerprint(model_fingerprint_);
    request.set_plan_id(plan_id_);
    request.set_leader(name_);
    v1::JoinGroupResponse response;
    const Status status = FromGrpc(follower->stub->JoinGroup(&context, request, &response));
    ZEROC_RETURN_IF_ERROR(status.WithContext("follower " + follower->address));
    members.push_back({{response.transport_address()}, follower->address});
  }
  for (const CommMember& member : members) {
    v1::GroupMember* to = serve.add_members();
    to->set_transport_address(member.address.bytes);
    to->set_name(member.name);
  }
  {
    ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> comm, port_->Join(serve.epoch(), 0, members));
    MutexLock lock(mu_);
    if (stopping_) return Unavailable("stopping");
    epoch_ = serve.epoch();
    comm_ = std::move(comm);
    broken_ = OkStatus();
    n_begun_ = 0;
    n_formed_ = 0;
  }
  for (std::size_t i = 0; i < followers_.size(); ++i) {
    Follower& follower = *followers_[i];
    serve.set_rank(static_cast<std::uint32_t>(i) + 1);
    follower.context = std::make_unique<grpc::ClientContext>();
    follower.events = follower.stub->ServeGroup(follower.context.get(), serve);
    follower.reader = std::thread([this, &follower] { Read(follower); });
  }
  const auto until = std::chrono::steady_clock::now() + options_.patience;
  MutexLock lock(mu_);
  while (n_formed_ < static_cast<int>(followers_.size()) && broken_.ok() && !stopping_) {
    if (!changed_.WaitUntil(mu_, until)) break;
  }
  if (!broken_.ok()) return broken_;
  if (n_formed_ == static_cast<int>(followers_.size())) return OkStatus();
  return DeadlineExceeded("only " + std::to_string(n_formed_) + " of " + std::to_string(followers_.size()) +
                          " followers entered the group");
}

void PrefillGroup::Read(Follower& follower) {
  v1::GroupEvent event;
  while (follower.events->Read(&event)) {
    if (event.has_formed()) {
      MutexLock lock(mu_);
      ++n_formed_;
      changed_.NotifyAll();
    } else if (event.has_failed()) {
      const v1::ShareFailed& failed = event.failed();
      const bool known = failed.code() > 0 && failed.code() <= static_cast<unsigned>(StatusCode::kUnauthenticated);
      Break(Status(known ? static_cast<StatusCode>(failed.code()) : StatusCode::kUnknown,
                   "follower " + follower.address + ": " + failed.message()));
    }
  }
  const Status status = FromGrpc(follower.events->Finish());
  Break(Unavailable("follower " + follower.address +
                    " is lost: " + (status.ok() ? "it left" : std::string(status.message()))));
}

void PrefillGroup::Dissolve() {
  std::shared_ptr<Communicator> comm;
  Status why;
  {
    MutexLock lock(mu_);
    comm = std::move(comm_);
    why = broken_;
  }
  if (comm != nullptr) comm->Abort(why.ok() ? Unavailable("the prefill group ended") : why);
  for (const auto& follower : followers_) {
    if (follower->context != nullptr) follower->context->TryCancel();
  }
  for (const auto& follower : followers_) {
    if (follower->reader.joinable()) follower->reader.join();
    follower->events.reset();
    follower->context.reset();
  }
}

void PrefillGroup::Break(const Status& why) {
  std::shared_ptr<Communicator> comm;
  {
    MutexLock lock(mu_);
    if (comm_ == nullptr || !broken_.ok()) return;
    broken_ = why;
    ready_ = false;
    comm = comm_;
    changed_.NotifyAll();
  }
  comm->Abort(why);
}

Result<PrefillGroup::Begun> PrefillGroup::Begin(const v1::PrefillRequest& request, SpScheme scheme,
                                                std::chrono::milliseconds timeout) {
  Begun begun;
  v1::ShareRequest share;
  {
    MutexLock lock(mu_);
    if (!ready_ || comm_ == nullptr) return Unavailable("the prefill group is not formed");
    begun.comm = comm_;
    begun.number = ++n_begun_;
    share.set_epoch(epoch_);
    computing_ = true;
  }
  share.set_number(begun.number);
  share.set_scheme(std::string(SpSchemeName(scheme)));
  *share.mutable_request() = request;
  share.set_patience_ms(static_cast<std::uint32_t>(options_.patience.count()));
  share.set_timeout_ms(static_cast<std::uint32_t>(std::max<std::int64_t>(0, timeout.count())));
  for (const auto& follower : followers_) {
    grpc::ClientContext context;
    SetDeadline(context, options_.patience);
    v1::ShareResponse response;
    Status status = FromGrpc(follower->stub->RunShare(&context, share, &response));
    if (status.ok()) continue;
    status = status.WithContext("follower " + follower->address);
    // Who is too slow to answer is as good as lost; the deadline is ours, not the request's.
    if (status.code() == StatusCode::kDeadlineExceeded) status = Unavailable(std::string(status.message()));
    Break(status);
    return status;  // Ended is called for it, too
  }
  return begun;
}

void PrefillGroup::Ended(const Status& status) {
  if (!status.ok()) Break(status);
  MutexLock lock(mu_);
  computing_ = false;
  changed_.NotifyAll();
}

// --- a follower ---

void GroupMember::Stop() {
  Rank rank;
  Sink sink;
  {
    MutexLock lock(mu_);
    rank = std::move(rank_);
    sink = std::move(sink_);
    rank_ = {};
    epoch_ = 0;
  }
  if (rank.comm != nullptr) rank.comm->Abort(Unavailable("a rank of the prefill group is stopping"));
  if (sink != nullptr) sink->End(Unavailable("stopping"));
}

Result<PeerAddress> GroupMember::Join() {
  MutexLock lock(mu_);
  if (port_ == nullptr) {
    ZEROC_ASSIGN_OR_RETURN(port_, CommPort::Open(transport_, {}));
  }
  return port_->address();
}

void GroupMember::Serve(const v1::ServeGroupRequest& request, Sink sink) {
  std::vector<CommMember> members;
  for (const v1::GroupMember& member : request.members()) {
    members.push_back({{member.transport_address()}, EscapeControls(member.name())});
  }
  const auto rank = static_cast<std::int64_t>(request.rank());
  if (members.size() > Communicator::kRanksMax || rank < 1 || rank >= std::ssize(members)) {
    return sink->End(InvalidArgument("rank " + std::to_string(rank) + " of " + std::to_string(members.size())));
  }
  Sink replaced;
  Rank old;
  {
    MutexLock lock(mu_);
    if (port_ == nullptr) return sink->End(FailedPrecondition("JoinGroup comes first"));
    Result<std::unique_ptr<Communicator>> joined = port_->Join(request.epoch(), static_cast<int>(rank), members);
    if (!joined.ok()) return sink->End(joined.status());
    replaced = std::exchange(sink_, sink);
    old = std::exchange(rank_, Rank{std::move(*joined), static_cast<int>(rank), static_cast<int>(members.size())});
    epoch_ = request.epoch();
  }
  if (replaced != nullptr) replaced->End(Cancelled("another group has taken this worker"));
  LogInfo("prefill group entered leader=" + EscapeControls(request.leader()) + " rank=" + std::to_string(rank) +
          " ranks=" + std::to_string(members.size()));
  v1::GroupEvent event;
  event.mutable_formed();
  sink->Send(std::move(event));
}

void GroupMember::Leave(std::uint64_t epoch, const Status& why) {
  Rank rank;
  Sink sink;
  {
    MutexLock lock(mu_);
    if (epoch != epoch_) return;
    epoch_ = 0;
    rank = std::exchange(rank_, {});
    sink = std::exchange(sink_, nullptr);
  }
  LogInfo("prefill group left: " + EscapeControls(why.ToString()));
  if (rank.comm != nullptr) rank.comm->Abort(why);
  if (sink != nullptr) sink->End(why);
}

Result<GroupMember::Rank> GroupMember::Find(std::uint64_t epoch) const {
  MutexLock lock(mu_);
  if (epoch == 0 || epoch != epoch_) return Unavailable("this worker is not in that prefill group any more");
  return rank_;
}

void GroupMember::Report(std::uint64_t epoch, std::uint32_t number, const Status& status) {
  MutexLock lock(mu_);
  if (epoch != epoch_ || sink_ == nullptr) return;
  v1::GroupEvent event;
  event.mutable_failed()->set_number(number);
  event.mutable_failed()->set_code(static_cast<std::uint32_t>(status.code()));
  event.mutable_failed()->set_message(std::string(status.message()));
  sink_->Send(std::move(event));
}

}  // namespace zeroc
