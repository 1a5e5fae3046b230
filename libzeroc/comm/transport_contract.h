// The contract of Transport as one test suite, instantiated for every implementation. A harness makes transports that
// can reach each other and knows how to wait for them.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "libzeroc/comm/transport.h"
#include "libzeroc/comm/transport_testing.h"

namespace zeroc {

class TransportHarness {
 public:
  virtual ~TransportHarness() = default;
  virtual Result<std::unique_ptr<Transport>> Make(const TransportOptions& options, TransportListener& listener) = 0;
  // True as soon as `condition` holds, false after about `seconds`.
  virtual bool WaitFor(const std::function<bool()>& condition, double seconds) = 0;
  virtual Delivery delivery() const = 0;     // to an arena made by AllocateArena
  virtual bool may_use_threads() const = 0;  // the transport may be called from several threads
};

struct TransportKind {
  std::string name;
  std::function<std::unique_ptr<TransportHarness>()> make;
};

class TransportContract : public ::testing::TestWithParam<TransportKind> {
 protected:
  static constexpr std::uint64_t kArenaBytes = 16 << 20;
  static constexpr std::size_t kManyPieces = 9 << 20;  // more than the window holds, by default 8 of 1 MiB
  static constexpr WriteTag kTag{11, 3};
  static constexpr double kPatience = 20;  // seconds; a bound against hanging, not a promise

  TransportContract();
  ~TransportContract() override;

  // decode_ with an arena, prefill_ connected to it as `decode`; both up. From decode_'s side the peer is `prefill`.
  void Join(TransportOptions options = {});
  bool Wait(const std::function<bool()>& condition) { return harness_->WaitFor(condition, kPatience); }
  std::unique_ptr<Transport> Make(const TransportOptions& options, TransportListener& listener);

  std::unique_ptr<TransportHarness> harness_;
  RecordingListener prefill_hears_, decode_hears_;
  std::unique_ptr<Transport> prefill_, decode_;
  std::span<std::byte> arena_;
  PeerId to_decode_ = PeerId::kNone, to_prefill_ = PeerId::kNone;
};

}  // namespace zeroc
