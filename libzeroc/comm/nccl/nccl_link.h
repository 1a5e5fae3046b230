// A thin wall before NCCL: one rank's place in a clique of GPUs that send each other bytes. Without a GPU a twin
// (nccl_link_twin.cc) stands in for it, which moves bytes between threads of one process by NCCL's rules:
//
// - Messages have no names: the n-th that a rank sends to another meets the n-th that this one receives from it. Both
//   must be of one size; in NCCL anything may happen otherwise, in the twin they never end.
// - What is given to one Exchange runs at the same time, and ends as a whole. Exchanges run one after the other, in the
//   order of the stream: one that waits for a peer holds up all that is behind it.
// - What no peer answers never ends, until Abort.
//
// Nothing here blocks but Abort, which waits for the device to let go. Not thread-safe; one stream. On a GPU the
// current device is used, and ranks need one each (docs/cuda.md).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kernels/cuda/runtime.h"

namespace zeroc {

// Made by one rank, known to all: who has it can join.
struct NcclId {
  std::array<std::byte, 128> bytes{};
};

class NcclLink {
 public:
  enum class State : std::uint8_t { kReady, kBusy, kFailed };

  struct Transfer {
    bool is_send;
    int peer;           // another rank
    std::byte* data;    // on the device; what is sent is only read
    std::size_t bytes;  // at least 1
  };

  // False, and *error says why.
  static bool MakeId(NcclId* id, std::string* error);
  // Begins to join; Poll tells when all ranks have. Null, and *error says why.
  static std::unique_ptr<NcclLink> Open(const NcclId& id, int rank, int size, std::string* error);
  ~NcclLink();  // aborts
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  // Only when the last Poll said kReady. While Poll says kBusy it is not on the stream yet: nothing that is to run
  // behind it may be given to the stream.
  void Exchange(std::span<const Transfer> transfers, kernels::cuda::Stream stream);
  State Poll();
  const std::string& error() const;  // of kFailed

  // No memory of this rank is in use any more when it returns and the stream has been waited for. Nothing but the
  // destructor may follow.
  void Abort();

 private:
  struct Impl;
  explicit NcclLink(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace zeroc
