// Keys and values of one KV head in float32 slots, and exact softmax attention over them.
//
// The methods of this folder differ in which numbers they keep, not in how they attend: each writes into the slots the
// values that its decoder would give back. Plain loops over vectors of 16 floats, compiled for several instruction
// sets. Not thread-safe; different stores may be used at the same time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace zeroc {

class HeadStore {
 public:
  static constexpr int kBlock = 64;  // slots that share a transposed key tile

  // head_dim is a multiple of kLanes.
  static constexpr int kLanes = 16;
  HeadStore(int head_dim, int capacity);
  static std::uint64_t Bytes(int head_dim, int capacity);

  int head_dim() const { return head_dim_; }
  int capacity() const { return capacity_; }
  int size() const { return size_; }

  // k, v [head_dim] into slot size(); the store is not full.
  void Append(const float* k, const float* v);
  void GetKey(int slot, float* k) const;
  void SetKey(int slot, const float* k);
  float& Key(int slot, int i) { return keys_[KeyIndex(slot, i)]; }
  float* Value(int slot) {
    return values_.data() + static_cast<std::size_t>(slot) * static_cast<std::size_t>(head_dim_);
  }
  const float* Value(int slot) const { return const_cast<HeadStore*>(this)->Value(slot); }

  // Slots keep[0] < keep[1] < .. move to 0, 1, ..; the rest is dropped.
  void Keep(std::span<const int> keep);
  // The last slot takes the place of `slot`.
  void ReplaceByLast(int slot);

  // p[r, t] = softmax over t < n_visible[r] of q[r] . k[t], zero for the other t < stride. q [n_rows, head_dim] is
  // scaled; 1 <= n_visible[r] <= size(); stride is a multiple of kBlock, no smaller than the largest n_visible.
  void Probabilities(const float* q, std::span<const int> n_visible, float* p, std::int64_t stride) const;

  // out[r] = sum over t < n_slots of p[r, t] v[t]; n_slots <= size().
  void WeightedValues(const float* p, std::int64_t stride, int n_rows, int n_slots, float* out) const;

 private:
  std::size_t KeyIndex(int slot, int i) const {
    return static_cast<std::size_t>(slot / kBlock) * static_cast<std::size_t>(kBlock * head_dim_) +
           static_cast<std::size_t>(i * kBlock + slot % kBlock);
  }
  void Copy(int from, int to);

  int head_dim_;
  int capacity_;
  int size_ = 0;
  std::vector<float> keys_;    // [capacity / kBlock, head_dim, kBlock]
  std::vector<float> values_;  // [capacity, head_dim]
};

}  // namespace zeroc
