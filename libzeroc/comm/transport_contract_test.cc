// The transport contract over loopback and over the fake network.
#include "libzeroc/comm/transport_contract.h"

#include "libzeroc/comm/fake_transport.h"
#include "libzeroc/comm/loopback_transport.h"

namespace zeroc {
namespace {

class LoopbackHarness final : public TransportHarness {
 public:
  explicit LoopbackHarness(Delivery delivery) : delivery_(delivery) {}
  Result<std::unique_ptr<Transport>> Make(const TransportOptions& options, TransportListener& listener) override {
    auto transport = LoopbackTransport::Create(options, listener, hub_, delivery_);
    if (!transport.ok()) return transport.status();
    return std::unique_ptr<Transport>(std::move(transport).value());
  }
  bool WaitFor(const std::function<bool()>& condition, double seconds) override {
    return WaitOnThreads(condition, seconds);
  }
  Delivery delivery() const override { return delivery_; }
  bool may_use_threads() const override { return true; }

 private:
  const Delivery delivery_;
  std::shared_ptr<LoopbackHub> hub_ = std::make_shared<LoopbackHub>();
};

class FakeHarness final : public TransportHarness {
 public:
  FakeHarness(Delivery delivery, double delay_max_seconds) : network_(4711, delivery), delivery_(delivery) {
    network_.set_faults({.delay_min_seconds = 5e-6, .delay_max_seconds = delay_max_seconds});
  }
  Result<std::unique_ptr<Transport>> Make(const TransportOptions& options, TransportListener& listener) override {
    auto transport = network_.Create(options, listener);
    if (!transport.ok()) return transport.status();
    return std::unique_ptr<Transport>(std::move(transport).value());
  }
  bool WaitFor(const std::function<bool()>& condition, double seconds) override {
    const double until = network_.now_seconds() + seconds;
    while (!condition()) {
      if (!network_.Step() || network_.now_seconds() > until) return condition();
    }
    return true;
  }
  Delivery delivery() const override { return delivery_; }
  bool may_use_threads() const override { return false; }

 private:
  FakeNetwork network_;
  const Delivery delivery_;
};

template <typename Harness, typename... Args>
TransportKind Kind(const std::string& name, Args... args) {
  return {name, [=] { return std::make_unique<Harness>(args...); }};
}

INSTANTIATE_TEST_SUITE_P(InProcess, TransportContract,
                         ::testing::Values(Kind<LoopbackHarness>("LoopbackAm", Delivery::kActiveMessage),
                                           Kind<LoopbackHarness>("LoopbackPut", Delivery::kPut),
                                           Kind<FakeHarness>("FakeAm", Delivery::kActiveMessage, 5e-6),
                                           Kind<FakeHarness>("FakePut", Delivery::kPut, 5e-6),
                                           Kind<FakeHarness>("FakeAmReordering", Delivery::kActiveMessage, 5e-3),
                                           Kind<FakeHarness>("FakePutReordering", Delivery::kPut, 5e-3)),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace zeroc
