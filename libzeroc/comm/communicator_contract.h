// The contract of Communicator as one test suite, instantiated for every implementation. A harness makes groups; each
// rank of a test runs on a thread of its own.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/comm/communicator.h"
#include "libzeroc/comm/transport_communicator.h"

namespace zeroc {

class CommunicatorHarness {
 public:
  virtual ~CommunicatorHarness() = default;
  virtual std::vector<std::unique_ptr<Communicator>> MakeGroup(int size) = 0;
};

struct CommunicatorKind {
  std::string name;
  std::function<std::unique_ptr<CommunicatorHarness>()> make;
};

// Ranks with a CommPort each, all in this process. The ports are kept from group to group.
class PortHarness final : public CommunicatorHarness {
 public:
  explicit PortHarness(MakeTransport make_transport) : make_transport_(std::move(make_transport)) {}
  std::vector<std::unique_ptr<Communicator>> MakeGroup(int size) override;

 private:
  const MakeTransport make_transport_;
  std::vector<std::unique_ptr<CommPort>> ports_;
  std::uint64_t epoch_ = 0;
};

class CommunicatorContract : public ::testing::TestWithParam<CommunicatorKind> {
 protected:
  CommunicatorContract() : harness_(GetParam().make()) {}

  // Runs `rank_main` for every rank of a new group at the same time, and waits for all. Groups end with the test.
  void Run(int size, const std::function<void(Communicator&)>& rank_main);

  std::unique_ptr<CommunicatorHarness> harness_;
  std::vector<std::unique_ptr<Communicator>> group_;  // of the latest Run
};

}  // namespace zeroc
