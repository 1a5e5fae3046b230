// The Communicator over a Transport (UCX: shared memory, TCP, RDMA; loopback): messages are cut into the transport's
// and put together in the receiver's memory as the pieces arrive, in any order.
//
// A CommPort is a worker's place in such groups: it owns the transport, whose address the others need, and outlives the
// groups that it joins, one after the other. A group is named by its epoch, a number that nobody outside knows or has
// used before; what comes with another one, late or foreign, is dropped. Nobody may send before everybody has joined:
// whoever forms the group sees to that.
//
// Trust: sizes, ranks and epochs are checked; whoever knows the epoch can disturb the group, but write nowhere except
// into memory that a rank waits to receive.
//
// Threads: Join from one thread at a time; the port outlives its communicators.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/communicator.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

// Makes the transport of a port; its arena is not used.
using MakeTransport = std::function<Result<std::unique_ptr<Transport>>(TransportListener&)>;

struct CommMember {
  PeerAddress address;
  std::string name;  // for messages and logs
};

class CommPort {
 public:
  struct Options {
    // Messages that arrive before anybody waits for them. A rank runs ahead of another by a layer at most, so this much
    // means that something is wrong: the group is aborted with kResourceExhausted.
    std::uint64_t unexpected_bytes_max = std::uint64_t{1} << 30;
  };

  static Result<std::unique_ptr<CommPort>> Open(const MakeTransport& make_transport, const Options& options);
  ~CommPort();

  PeerAddress address() const;

  // The communicator of `rank` among members (its own entry included, 1 to kRanksMax). The one of an earlier epoch is
  // aborted. kInvalidArgument for an epoch of 0 or a bad address. Whether the others can be reached shows when they are
  // waited for.
  Result<std::unique_ptr<Communicator>> Join(std::uint64_t epoch, int rank, const std::vector<CommMember>& members);

  class Impl;  // opaque

 private:
  explicit CommPort(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace zeroc
