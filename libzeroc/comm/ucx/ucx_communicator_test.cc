// The contract of communicators over UCX.
#include "libzeroc/comm/communicator_contract.h"
#include "libzeroc/comm/ucx/ucx_transport.h"

namespace zeroc {
namespace {

CommunicatorKind Kind(const std::string& name, const std::string& tls, const std::string& devices) {
  return {name, [=] {
            return std::make_unique<PortHarness>([=](TransportListener& listener) {
              UcxTransportOptions options;
              options.tls = tls;
              options.net_devices = devices;
              return CreateUcxTransport(options, listener);
            });
          }};
}

// The devices are named: outside lo, a test must not listen.
INSTANTIATE_TEST_SUITE_P(Ucx, CommunicatorContract,
                         ::testing::Values(Kind("Tcp", "tcp", "lo"), Kind("Shm", "posix,cma,self", "auto"),
                                           Kind("Auto", "auto", "lo")),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace zeroc
