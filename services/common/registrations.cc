#include "services/common/registrations.h"

#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "services/common/logging.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

// How long the end waits for a resolver that does not answer before it leaves the thread to itself.
constexpr std::chrono::milliseconds kResolverGrace(500);

// Certificates hold names without the dot that ends a fully qualified one.
std::string WithoutFinalDot(const std::string& host) {
  return host.ends_with('.') ? host.substr(0, host.size() - 1) : host;
}

}  // namespace

Result<std::vector<HostPort>> ParseHostPorts(std::string_view text) {
  std::vector<HostPort> routers;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    HostPort router;
    ZEROC_ASSIGN_OR_RETURN(router, ParseHostPort(text.substr(begin, comma - begin)));
    routers.push_back(std::move(router));
    begin = comma + 1;
  }
  return routers;
}

Result<std::vector<std::string>> ResolveAddresses(const HostPort& router) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_ADDRCONFIG;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(router.host.c_str(), nullptr, &hints, &found); error != 0) {
    return Unavailable("cannot resolve '" + router.host + "': " + gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  std::vector<std::string> v4, v6;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    char host[NI_MAXHOST];
    if (getnameinfo(at->ai_addr, at->ai_addrlen, host, sizeof host, nullptr, 0, NI_NUMERICHOST) != 0) continue;
    const bool is_v6 = at->ai_family == AF_INET6;
    std::string address = is_v6 ? "[" : "";
    address.append(host).append(is_v6 ? "]:" : ":").append(std::to_string(router.port));
    (is_v6 ? v6 : v4).push_back(std::move(address));
  }
  std::vector<std::string>& addresses = v4.empty() ? v6 : v4;
  if (addresses.empty()) return Unavailable("'" + router.host + "' has no address");
  std::sort(addresses.begin(), addresses.end());
  addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
  return std::move(addresses);
}

// Shared with the thread, which a resolver may hold longer than the worker wants to live.
struct Registrations::Impl {
  Impl(RegistrationsOptions the_options, const v1::WorkerInfo& the_info, std::function<void(v1::WorkerLoad*)> the_load)
      : options(std::move(the_options)), info(the_info), load(std::move(the_load)) {}

  using Members = std::map<std::string, std::unique_ptr<Registration>>;  // by address
  using Wanted = std::map<std::string, std::string>;                     // address -> host

  void Run();
  Wanted ResolveAll(bool* complete);
  void Join(const Wanted& wanted) ZEROC_REQUIRES(mu);
  Members TakeLost(const Wanted& wanted) ZEROC_REQUIRES(mu);

  const RegistrationsOptions options;
  const v1::WorkerInfo info;
  const std::function<void(v1::WorkerLoad*)> load;

  mutable Mutex mu;
  CondVar wake;
  bool stopping ZEROC_GUARDED_BY(mu) = false;
  bool finished ZEROC_GUARDED_BY(mu) = false;
  bool draining ZEROC_GUARDED_BY(mu) = false;
  Members members ZEROC_GUARDED_BY(mu);
  Status resolve_error ZEROC_GUARDED_BY(mu) = Unavailable("not yet registered");
};

Registrations::Impl::Wanted Registrations::Impl::ResolveAll(bool* complete) {
  Wanted wanted;
  Status error;
  for (const HostPort& router : options.routers) {
    const Result<std::vector<std::string>> addresses = options.resolve(router);
    if (!addresses.ok()) {
      error = addresses.status().WithContext("routers");
      continue;
    }
    for (const std::string& address : *addresses) wanted.emplace(address, router.host);
  }
  *complete = error.ok();
  MutexLock lock(mu);
  if (!error.ok() && error.ToString() != resolve_error.ToString()) LogWarning(error.ToString());  // once per cause
  resolve_error = error;
  return wanted;
}

void Registrations::Impl::Join(const Wanted& wanted) {
  for (const auto& [address, host] : wanted) {
    std::unique_ptr<Registration>& member = members[address];
    if (member != nullptr) continue;
    RegistrationOptions each = options.each;
    each.router_address = address;
    each.security.server_name = WithoutFinalDot(host);
    member = Registration::Start(std::move(each), info, load);
    if (draining) member->SetDraining(true);
  }
}

Registrations::Impl::Members Registrations::Impl::TakeLost(const Wanted& wanted) {
  Members lost;
  for (auto at = members.begin(); at != members.end();) {
    if (wanted.contains(at->first) || at->second->registered()) {
      ++at;
    } else {
      LogInfo("router gone address=" + at->first);
      lost.insert(members.extract(at++));
    }
  }
  return lost;
}

void Registrations::Impl::Run() {
  for (;;) {
    bool complete = false;
    const Wanted wanted = ResolveAll(&complete);
    Members lost;  // ended without the lock: that waits for gRPC
    {
      MutexLock lock(mu);
      if (!stopping) Join(wanted);
      if (!stopping && complete) lost = TakeLost(wanted);
    }
    lost.clear();
    const Clock::time_point next = Clock::now() + std::chrono::milliseconds(options.resolve_ms);
    MutexLock lock(mu);
    while (!stopping && wake.WaitUntil(mu, next)) {
    }
    if (!stopping) continue;
    finished = true;
    wake.NotifyAll();
    return;
  }
}

std::unique_ptr<Registrations> Registrations::Start(RegistrationsOptions options, const v1::WorkerInfo& info,
                                                    std::function<void(v1::WorkerLoad*)> load) {
  auto impl = std::make_shared<Impl>(std::move(options), info, std::move(load));
  std::thread([impl] { impl->Run(); }).detach();  // getaddrinfo cannot be interrupted: nothing may have to join it
  return std::unique_ptr<Registrations>(new Registrations(std::move(impl)));
}

Registrations::Registrations(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Registrations::~Registrations() {
  Impl::Members members;
  {
    MutexLock lock(impl_->mu);
    impl_->stopping = true;
    impl_->wake.NotifyAll();
    const Clock::time_point until = Clock::now() + kResolverGrace;
    while (!impl_->finished && impl_->wake.WaitUntil(impl_->mu, until)) {
    }
    members.swap(impl_->members);
  }
}

std::size_t Registrations::n_registered() const {
  MutexLock lock(impl_->mu);
  return static_cast<std::size_t>(std::count_if(impl_->members.begin(), impl_->members.end(),
                                                [](const auto& entry) { return entry.second->registered(); }));
}

Status Registrations::Ready() const {
  MutexLock lock(impl_->mu);
  Status why = impl_->resolve_error;
  for (const auto& [address, member] : impl_->members) {
    if (member->registered()) return OkStatus();
    why = member->last_error();
  }
  return why.ok() ? Unavailable("registered with no router") : why.WithContext("registered with no router");
}

void Registrations::SetDraining(bool draining) {
  MutexLock lock(impl_->mu);
  impl_->draining = draining;
  for (const auto& [address, member] : impl_->members) member->SetDraining(draining);
}

}  // namespace zeroc
