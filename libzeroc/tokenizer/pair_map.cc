#include "libzeroc/tokenizer/pair_map.h"

#include <algorithm>
#include <bit>

namespace zeroc {

PairMap::PairMap(std::size_t n) : slots_(std::bit_ceil(std::max<std::size_t>(2 * n, 16))), mask_(slots_.size() - 1) {}

void PairMap::Insert(std::uint32_t first, std::uint32_t second, std::uint64_t value) {
  if (2 * (size_ + 1) > slots_.size()) Grow();
  const std::uint64_t key = Key(first, second);
  std::size_t i = Home(key);
  while (slots_[i].key != kEmpty && slots_[i].key != key) i = (i + 1) & mask_;
  if (slots_[i].key == kEmpty) ++size_;
  slots_[i] = {key, value};
}

void PairMap::Grow() {
  const std::vector<Slot> old = std::move(slots_);
  slots_.assign(2 * old.size(), Slot{});
  mask_ = slots_.size() - 1;
  for (const Slot& slot : old) {
    if (slot.key == kEmpty) continue;
    std::size_t i = Home(slot.key);
    while (slots_[i].key != kEmpty) i = (i + 1) & mask_;
    slots_[i] = slot;
  }
}

}  // namespace zeroc
