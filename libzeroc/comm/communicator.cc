#include "libzeroc/comm/communicator.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "libzeroc/base/check.h"

namespace zeroc {

Communicator::Communicator(int rank, int size) : rank_(rank), size_(size) {
  ZEROC_CHECK(size >= 1 && size <= kRanksMax && rank >= 0 && rank < size, rank, size);
}

CommOp Communicator::Send(int to, std::uint64_t tag, Parts parts) {
  bytes_sent_.fetch_add(CountBytes(parts), std::memory_order_relaxed);
  return PostSend(to, tag, std::move(parts));
}

Status Communicator::WaitAll(std::span<const CommOp> ops, TimePoint deadline) {
  Status first;
  for (const CommOp op : ops) {
    const Status status = Wait(op, deadline);
    if (first.ok()) first = status;
  }
  return first;
}

std::vector<CommOp> Communicator::AllGather(std::uint64_t tag, const Parts& ours, std::vector<Places> places) {
  return AllToAll(tag, std::vector<Parts>(static_cast<std::size_t>(size_), ours), std::move(places));
}

// The next rank first, so that not everybody sends to the same one at the same time.
std::vector<CommOp> Communicator::AllToAll(std::uint64_t tag, std::vector<Parts> parts, std::vector<Places> places) {
  ZEROC_CHECK(std::ssize(parts) == size_ && std::ssize(places) == size_, parts.size(), places.size(), size_);
  std::vector<CommOp> ops;
  for (int step = 1; step < size_; ++step) {
    const int from = (rank_ + size_ - step) % size_;
    ops.push_back(Recv(from, tag, std::move(places[static_cast<std::size_t>(from)])));
  }
  for (int step = 1; step < size_; ++step) {
    const int to = (rank_ + step) % size_;
    ops.push_back(Send(to, tag, std::move(parts[static_cast<std::size_t>(to)])));
  }
  return ops;
}

Status Communicator::Barrier(TimePoint deadline) {
  const std::uint64_t tag = kReservedTags + n_barriers_++;
  const auto n = static_cast<std::size_t>(size_);
  const std::vector<CommOp> ops = AllToAll(tag, std::vector<Parts>(n), std::vector<Places>(n));
  return WaitAll(ops, deadline).WithContext("barrier");
}

std::size_t CountBytes(const Communicator::Parts& parts) {
  std::size_t n = 0;
  for (const auto& part : parts) n += part.size();
  return n;
}

std::size_t CountBytes(const Communicator::Places& places) {
  std::size_t n = 0;
  for (const auto& place : places) n += place.size();
  return n;
}

void Scatter(std::span<const std::byte> bytes, std::size_t offset, const Communicator::Places& places) {
  for (const std::span<std::byte> place : places) {
    if (bytes.empty()) return;
    if (offset >= place.size()) {
      offset -= place.size();
      continue;
    }
    const std::size_t n = std::min(bytes.size(), place.size() - offset);
    std::memcpy(place.data() + offset, bytes.data(), n);
    bytes = bytes.subspan(n);
    offset = 0;
  }
  ZEROC_CHECK(bytes.empty(), bytes.size());
}

}  // namespace zeroc
