// Write + Flush between two UCX transports of one process (two worker threads), over TCP on lo and over shared memory,
// beside plain memcpy of the same size. Bytes rotate over a 256 MiB arena, so that caches do not flatter large sizes.
// Bytes per second count each byte once. The last write of each run is compared, so a transport that loses bytes shows
// as an error.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libzeroc/comm/ucx/ucx_transport.h"

namespace zeroc {
namespace {

constexpr std::size_t kArenaBytes = 256 << 20;

class AcceptAll final : public TransportListener {
 public:
  void OnPeerUp(PeerId, const PeerInfo&) override { up_.set_value(); }
  bool AcceptWrite(PeerId, const WriteTag&, std::uint64_t, std::uint64_t) override { return true; }
  void OnWriteDone(PeerId, const WriteTag&, std::uint64_t, std::uint64_t, const Status&) override {}
  Status OnMessage(PeerId, std::uint16_t, std::span<const std::byte>) override { return OkStatus(); }
  void OnProtocolError(PeerId, const Status&) override {}
  void OnPeerFailure(PeerId, const Status&) override {}
  void WaitUp() { up_.get_future().wait(); }

 private:
  std::promise<void> up_;
};

std::vector<std::byte>& Source() {
  static std::vector<std::byte> source(kArenaBytes, std::byte{0x5a});
  return source;
}

void WriteAndFlush(benchmark::State& state, const std::string& tls, const std::string& devices, bool own_memory) {
  UcxTransportOptions options;
  options.tls = tls;
  options.net_devices = devices;
  AcceptAll decode_hears, prefill_hears;
  std::vector<std::byte> memory(own_memory ? kArenaBytes : 0);
  auto decode = CreateUcxTransport(options, decode_hears);
  auto prefill = CreateUcxTransport(options, prefill_hears);
  if (!decode.ok() || !prefill.ok()) return state.SkipWithError("no transport");
  std::span<std::byte> arena(memory);
  if (own_memory) {
    if (!(*decode)->RegisterArena(arena).ok()) return state.SkipWithError("no arena");
  } else {
    auto allocated = (*decode)->AllocateArena(kArenaBytes);
    if (!allocated.ok()) return state.SkipWithError("no arena");
    arena = *allocated;
  }
  std::fill(arena.begin(), arena.end(), std::byte{0});  // pages in
  const auto peer = (*prefill)->Connect((*decode)->LocalAddress(), (*decode)->LocalArena(), "decode");
  prefill_hears.WaitUp();
  state.SetLabel((*prefill)->Describe(*peer)->description);
  const auto bytes = static_cast<std::size_t>(state.range(0));
  std::size_t at = 0;
  bool ok = true;
  for (auto _ : state) {
    std::promise<bool> flushed;
    (*prefill)->Write(*peer, {1, 1}, std::span(Source()).subspan(at, bytes), at, nullptr);
    (*prefill)->Flush(*peer, [&](const Status& status) { flushed.set_value(status.ok()); });
    ok &= flushed.get_future().get();
    if (std::memcmp(arena.data() + at, Source().data() + at, 64) != 0) ok = false;
    at = at + 2 * bytes <= kArenaBytes ? at + bytes : 0;
  }
  if (!ok) state.SkipWithError("bytes were lost");
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * state.range(0));
}

void Memcpy(benchmark::State& state) {
  std::vector<std::byte> arena(kArenaBytes);
  const auto bytes = static_cast<std::size_t>(state.range(0));
  std::size_t at = 0;
  for (auto _ : state) {
    std::memcpy(arena.data() + at, Source().data() + at, bytes);
    benchmark::ClobberMemory();
    at = at + 2 * bytes <= kArenaBytes ? at + bytes : 0;
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * state.range(0));
}

void Sizes(benchmark::internal::Benchmark* bench) {
  bench->RangeMultiplier(4)->Range(64 << 10, 64 << 20)->UseRealTime()->MinTime(0.2);
}

BENCHMARK(Memcpy)->Apply(Sizes);
BENCHMARK_CAPTURE(WriteAndFlush, tcp, "tcp", "lo", false)->Apply(Sizes);
BENCHMARK_CAPTURE(WriteAndFlush, shm_put, "posix,cma,self", "auto", false)->Apply(Sizes);
BENCHMARK_CAPTURE(WriteAndFlush, shm_am, "posix,cma,self", "auto", true)->Apply(Sizes);

}  // namespace
}  // namespace zeroc

BENCHMARK_MAIN();
