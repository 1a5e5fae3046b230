// Real gRPC routers that take every worker, behind names that the test resolves.
#include "services/common/registrations.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "libzeroc/base/mutex.h"
#include "services/common/grpc_server.h"
#include "zeroc/v1/worker.grpc.pb.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

template <typename Condition>
bool WaitFor(Condition condition) {
  const auto end = steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (steady_clock::now() > end) return false;
    std::this_thread::sleep_for(milliseconds(2));
  }
  return true;
}

class FakeRouter : public v1::Registry::Service {
 public:
  FakeRouter() : FakeRouter("127.0.0.1:0") {}
  explicit FakeRouter(const std::string& address) {
    auto server = GrpcServer::Start(address, {}, {this});
    EXPECT_TRUE(server.ok()) << server.status().ToString();
    server_ = std::move(*server);
  }
  ~FakeRouter() override { server_.reset(); }  // cancels the streams, and before the counters are gone

  grpc::Status Register(grpc::ServerContext*,
                        grpc::ServerReaderWriter<v1::RouterDirective, v1::WorkerHeartbeat>* stream) override {
    v1::WorkerHeartbeat heartbeat;
    if (!stream->Read(&heartbeat)) return grpc::Status::OK;
    if (heartbeat.info().name() != "w") return {grpc::StatusCode::INVALID_ARGUMENT, "no name"};
    v1::RouterDirective directive;
    directive.set_accepted(true);
    directive.set_heartbeat_ms(20);
    stream->Write(directive);
    ++joined;
    do {
      if (heartbeat.load().draining()) ++draining;
    } while (stream->Read(&heartbeat));
    return grpc::Status::OK;
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(server_->port()); }

  std::atomic<int> joined{0};    // streams
  std::atomic<int> draining{0};  // heartbeats that said so

 private:
  std::unique_ptr<GrpcServer> server_;
};

class RegistrationsTest : public testing::Test {
 protected:
  void Name(Result<std::vector<std::string>> addresses) {
    MutexLock lock(mu_);
    addresses_ = std::move(addresses);
  }
  void Start() {
    v1::WorkerInfo info;
    info.set_name("w");
    RegistrationsOptions options;
    options.routers = {{"routers.test", 9000}};
    options.each.backoff_ms_max = 100;
    options.resolve_ms = 20;
    options.resolve = [this](const HostPort& router) -> Result<std::vector<std::string>> {
      EXPECT_EQ(router.host, "routers.test");
      ++n_resolved_;
      MutexLock lock(mu_);
      return addresses_;
    };
    registrations_ = Registrations::Start(options, info, [this](v1::WorkerLoad*) { ++n_loads_; });
  }
  bool WaitRegistered(std::size_t n) {
    return WaitFor([&] { return registrations_->n_registered() == n; });
  }
  // At least two whole rounds of resolving have passed.
  bool WaitResolved() {
    const int before = n_resolved_;
    return WaitFor([&] { return n_resolved_ >= before + 3; });
  }

  Mutex mu_;
  Result<std::vector<std::string>> addresses_ ZEROC_GUARDED_BY(mu_) = std::vector<std::string>();
  std::atomic<int> n_resolved_{0}, n_loads_{0};
  std::unique_ptr<Registrations> registrations_;
};

TEST_F(RegistrationsTest, EveryAddressOfANameIsRegisteredWithOnce) {
  FakeRouter a, b;
  Name(std::vector<std::string>{a.address()});
  Start();
  EXPECT_TRUE(WaitRegistered(1));
  EXPECT_TRUE(registrations_->Ready().ok());
  Name(std::vector<std::string>{a.address(), b.address()});
  EXPECT_TRUE(WaitRegistered(2));
  EXPECT_TRUE(WaitResolved());
  EXPECT_EQ(a.joined, 1);
  EXPECT_EQ(b.joined, 1);
  EXPECT_GE(n_loads_, 2);
}

TEST_F(RegistrationsTest, AnAddressThatTheNameHasLostGoesWithItsStream) {
  auto a = std::make_unique<FakeRouter>();
  FakeRouter b;
  const std::string address = a->address();
  Name(std::vector<std::string>{address, b.address()});
  Start();
  EXPECT_TRUE(WaitRegistered(2));
  Name(std::vector<std::string>{b.address()});
  EXPECT_TRUE(WaitResolved());
  EXPECT_EQ(registrations_->n_registered(), 2U) << "the stream of a router that drains lives on";
  a.reset();
  EXPECT_TRUE(WaitRegistered(1));
  EXPECT_TRUE(WaitResolved());
  // Somebody else has the address now, and is left alone.
  FakeRouter stranger(address);
  EXPECT_TRUE(WaitResolved());
  std::this_thread::sleep_for(milliseconds(300));  // longer than the longest back-off
  EXPECT_EQ(stranger.joined, 0);
  EXPECT_EQ(b.joined, 1);
}

TEST_F(RegistrationsTest, ARouterThatComesBackIsRegisteredWithAgain) {
  auto a = std::make_unique<FakeRouter>();
  const std::string address = a->address();
  Name(std::vector<std::string>{address});
  Start();
  EXPECT_TRUE(WaitRegistered(1));
  a.reset();
  EXPECT_TRUE(WaitRegistered(0));
  EXPECT_NE(registrations_->Ready().message().find("registered with no router"), std::string_view::npos)
      << registrations_->Ready().ToString();
  FakeRouter again(address);
  EXPECT_TRUE(WaitRegistered(1));
}

TEST_F(RegistrationsTest, AFailingNameServerChangesNothing) {
  FakeRouter a;
  Name(Unavailable("no name server"));
  Start();
  EXPECT_TRUE(WaitResolved());
  EXPECT_NE(registrations_->Ready().message().find("no name server"), std::string_view::npos)
      << registrations_->Ready().ToString();
  Name(std::vector<std::string>{a.address()});
  EXPECT_TRUE(WaitRegistered(1));
  Name(Unavailable("no name server"));
  EXPECT_TRUE(WaitResolved());
  EXPECT_EQ(registrations_->n_registered(), 1U);
}

TEST_F(RegistrationsTest, AllRoutersHearOfTheDrainAlsoThoseThatComeLater) {
  FakeRouter a, b;
  Name(std::vector<std::string>{a.address()});
  Start();
  EXPECT_TRUE(WaitRegistered(1));
  registrations_->SetDraining(true);
  EXPECT_TRUE(WaitFor([&] { return a.draining > 0; }));
  Name(std::vector<std::string>{a.address(), b.address()});
  EXPECT_TRUE(WaitFor([&] { return b.draining > 0; }));
}

TEST_F(RegistrationsTest, AResolverThatHangsDoesNotHoldUpTheEnd) {
  FakeRouter a;
  RegistrationsOptions options;
  options.routers = {{"routers.test", 9000}};
  options.resolve_ms = 1;
  const auto release = std::make_shared<std::atomic<bool>>(false);
  const auto rounds = std::make_shared<std::atomic<int>>(0);
  options.resolve = [release, rounds, address = a.address()](const HostPort&) -> Result<std::vector<std::string>> {
    if (++*rounds > 1) {
      while (!*release) std::this_thread::sleep_for(milliseconds(5));
    }
    return std::vector<std::string>{address};
  };
  v1::WorkerInfo info;
  info.set_name("w");
  registrations_ = Registrations::Start(options, info, [](v1::WorkerLoad*) {});
  EXPECT_TRUE(WaitRegistered(1));
  EXPECT_TRUE(WaitFor([&] { return *rounds > 1; }));
  const auto began = steady_clock::now();
  registrations_.reset();
  EXPECT_LT(steady_clock::now() - began, std::chrono::seconds(10));
  *release = true;
}

TEST(Routers, AreReadFromOneSetting) {
  const Result<std::vector<HostPort>> two = ParseHostPorts("router-0.zeroc:9000,127.0.0.1:9001");
  ASSERT_TRUE(two.ok()) << two.status().ToString();
  ASSERT_EQ(two->size(), 2U);
  EXPECT_EQ((*two)[0].host, "router-0.zeroc");
  EXPECT_EQ((*two)[1].port, 9001);
  for (const char* bad : {"", "a:1,", ",a:1", "a:1,b", "a:1,b:70000"}) EXPECT_FALSE(ParseHostPorts(bad).ok()) << bad;
}

TEST(Routers, NamesBecomeAddressesOfOneFamily) {
  const Result<std::vector<std::string>> local = ResolveAddresses({"localhost", 9000});
  ASSERT_TRUE(local.ok()) << local.status().ToString();
  EXPECT_EQ(*local, std::vector<std::string>{"127.0.0.1:9000"});
  EXPECT_EQ(*ResolveAddresses({"127.0.0.2", 1}), std::vector<std::string>{"127.0.0.2:1"});
  EXPECT_FALSE(ResolveAddresses({"no..such..name", 9000}).ok());
}

}  // namespace
}  // namespace zeroc
