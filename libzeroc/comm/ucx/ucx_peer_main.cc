// The other process of ucx_failure_test: a worker with an arena that accepts everything. Prints a line
// "PEER address key base bytes" (the first two in hex; UCX's own log shares standard output), then sleeps until its
// standard input ends. Test helper, not installed.
#include <unistd.h>

#include <cstdio>
#include <string>

#include "libzeroc/comm/ucx/ucx_transport.h"

namespace {

class AcceptAll final : public zeroc::TransportListener {
 public:
  void OnPeerUp(zeroc::PeerId, const zeroc::PeerInfo&) override {}
  bool AcceptWrite(zeroc::PeerId, const zeroc::WriteTag&, std::uint64_t, std::uint64_t) override { return true; }
  void OnWriteDone(zeroc::PeerId, const zeroc::WriteTag&, std::uint64_t, std::uint64_t, const zeroc::Status&) override {
  }
  zeroc::Status OnMessage(zeroc::PeerId, std::uint16_t, std::span<const std::byte>) override {
    return zeroc::OkStatus();
  }
  void OnProtocolError(zeroc::PeerId, const zeroc::Status&) override {}
  void OnPeerFailure(zeroc::PeerId, const zeroc::Status&) override {}
};

void PrintHex(const std::string& bytes) {
  for (const char c : bytes) std::printf("%02x", static_cast<unsigned char>(c));
  std::printf(" ");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  AcceptAll listener;
  zeroc::UcxTransportOptions options;
  options.name = "victim";
  options.tls = argv[1];
  options.net_devices = argv[2];
  auto transport = zeroc::CreateUcxTransport(options, listener);
  if (!transport.ok() || !(*transport)->AllocateArena(std::stoull(argv[3])).ok()) return 1;
  const zeroc::RemoteArena arena = (*transport)->LocalArena();
  std::printf("PEER ");
  PrintHex((*transport)->LocalAddress().bytes);
  PrintHex(arena.key);
  std::printf("%llu %llu\n", static_cast<unsigned long long>(arena.base), static_cast<unsigned long long>(arena.bytes));
  std::fflush(stdout);
  char c;
  while (::read(0, &c, 1) > 0) {
  }
  return 0;
}
