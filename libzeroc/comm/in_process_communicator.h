// The Communicator between threads of one process: bytes are copied once, from the sender's pieces into the receiver's,
// by whoever comes second. For tests and for ranks that share a process; no threads of its own.
#pragma once

#include <memory>
#include <vector>

#include "libzeroc/comm/communicator.h"

namespace zeroc {

// One communicator for each rank of a new group. They may go in any order.
std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(int size);

}  // namespace zeroc
