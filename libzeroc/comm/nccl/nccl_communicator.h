// The Communicator between GPUs: bytes go from device memory to device memory by NCCL, on a stream of its own, behind
// the work of the stream that it follows.
//
// It is built on a communicator between the same ranks in host memory, the bootstrap, which brings NCCL's id to
// everybody, carries 16 bytes beside each message (its size and its place in the order, which the receiver holds
// against its own: NCCL itself would hang or write amiss), and, as its end is ours, tells every rank why the group
// ended and whom it waited for in vain.
//
// NCCL knows no tags and runs one group of messages after the other, so beyond Communicator's rules:
//
// - AllGather and AllToAll are a group each, launched at once. All ranks post them in the same order.
// - Single messages are collected, and are a group from the next Wait or collective on. What one side posts between two
//   of these the other side posts between two of its own; in which order does not matter, tags decide.
// - A group ends as a whole. A rank may not post a receive into a group of which another message must have come before
//   its sender can send it: such receives are posted one by one.
//
// A message in one piece is sent from where it lies and received where it belongs. One of several is gathered in, or
// spread from, a buffer on the device by one copy for each piece, so that both sides may cut it as they like. The
// buffer grows to the largest group's messages in pieces.
//
// Wait polls, and never waits on the device: not for a rank that is dead, nor beyond the deadline.
#pragma once

#include <memory>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/communicator.h"

namespace zeroc {

// The communicator of bootstrap's rank on the current device. Every rank of it calls, before anything else was sent
// over it, and nobody uses it for anything else afterwards. Returns when bytes have gone between all ranks:
// kDeadlineExceeded when they have not by `deadline`, kFailedPrecondition without a device, kUnavailable for what NCCL
// says; the bootstrap has then ended.
Result<std::unique_ptr<Communicator>> MakeNcclCommunicator(std::unique_ptr<Communicator> bootstrap,
                                                           Communicator::TimePoint deadline);

}  // namespace zeroc
