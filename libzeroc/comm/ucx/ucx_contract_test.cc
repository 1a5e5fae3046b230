// The transport contract over UCX, two workers in one process.
#include "libzeroc/comm/transport_contract.h"
#include "libzeroc/comm/ucx/ucx_transport.h"

namespace zeroc {
namespace {

class UcxHarness final : public TransportHarness {
 public:
  UcxHarness(std::string tls, std::string net_devices, Delivery delivery)
      : tls_(std::move(tls)), net_devices_(std::move(net_devices)), delivery_(delivery) {}
  Result<std::unique_ptr<Transport>> Make(const TransportOptions& options, TransportListener& listener) override {
    UcxTransportOptions ucx;
    static_cast<TransportOptions&>(ucx) = options;
    ucx.tls = tls_;
    ucx.net_devices = net_devices_;
    return CreateUcxTransport(ucx, listener);
  }
  bool WaitFor(const std::function<bool()>& condition, double seconds) override {
    return WaitOnThreads(condition, seconds);
  }
  Delivery delivery() const override { return delivery_; }
  bool may_use_threads() const override { return true; }

 private:
  const std::string tls_, net_devices_;
  const Delivery delivery_;
};

TransportKind Kind(const std::string& name, const std::string& tls, const std::string& devices, Delivery delivery) {
  return {name, [=] { return std::make_unique<UcxHarness>(tls, devices, delivery); }};
}

// The devices are named: outside lo, a test must not listen.
INSTANTIATE_TEST_SUITE_P(Ucx, TransportContract,
                         ::testing::Values(Kind("Tcp", "tcp", "lo", Delivery::kActiveMessage),
                                           Kind("Shm", "posix,cma,self", "auto", Delivery::kPut),
                                           Kind("ShmPosix", "posix", "auto", Delivery::kPut),
                                           Kind("ShmSysv", "sysv,self", "auto", Delivery::kPut),
                                           Kind("Auto", "auto", "lo", Delivery::kPut)),
                         [](const auto& test) { return test.param.name; });

TEST(UcxTransport, UnknownTransportsAndDevicesAreErrors) {
  RecordingListener listener;
  const auto create = [&](const std::string& tls, const std::string& devices, int keepalive_ms) {
    UcxTransportOptions options;
    options.tls = tls;
    options.net_devices = devices;
    options.keepalive_interval_ms = keepalive_ms;
    return CreateUcxTransport(options, listener).status();
  };
  EXPECT_EQ(create("nosuch", "auto", 1000).code(), StatusCode::kUnavailable);
  const Status status = create("tcp", "nosuch0", 1000);
  EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_NE(status.message().find("nosuch0"), std::string_view::npos) << status.ToString();
  EXPECT_EQ(create("tcp", "lo", 1).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(create("", "lo", 1000).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(create("tcp", "lo", 1000).ok());
}

}  // namespace
}  // namespace zeroc
