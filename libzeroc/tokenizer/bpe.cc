#include "libzeroc/tokenizer/bpe.h"

#include <algorithm>
#include <functional>
#include <optional>

namespace zeroc {

Bpe::Bpe(const std::array<int, 256>& byte_ids, std::span<const BpeMerge> merges)
    : byte_ids_(byte_ids), merges_(merges.size()) {
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const BpeMerge& merge = merges[rank];
    merges_.Insert(static_cast<std::uint32_t>(merge.left), static_cast<std::uint32_t>(merge.right),
                   std::uint64_t{rank} << 32 | static_cast<std::uint32_t>(merge.result));
  }
}

void Bpe::PushPair(std::int32_t left, Scratch* scratch) const {
  const auto& symbols = scratch->symbols;
  const std::int32_t right = symbols[static_cast<std::size_t>(left)].next;
  if (right < 0) return;
  const std::optional<std::uint64_t> merge =
      merges_.Find(static_cast<std::uint32_t>(symbols[static_cast<std::size_t>(left)].id),
                   static_cast<std::uint32_t>(symbols[static_cast<std::size_t>(right)].id));
  if (merge) scratch->heap.push_back((*merge >> 32) << 32 | static_cast<std::uint32_t>(left));
}

void Bpe::Encode(std::string_view word, Scratch* scratch, std::vector<int>* ids) const {
  auto& symbols = scratch->symbols;
  auto& heap = scratch->heap;
  const auto n = static_cast<std::int32_t>(word.size());
  symbols.resize(word.size());
  for (std::int32_t i = 0; i < n; ++i) {
    const auto at = static_cast<std::size_t>(i);
    symbols[at] = {byte_ids_[static_cast<unsigned char>(word[at])], i - 1, i + 1 < n ? i + 1 : -1};
  }
  heap.clear();
  for (std::int32_t i = 0; i < n; ++i) PushPair(i, scratch);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const std::uint64_t top = heap.back();
    heap.pop_back();
    const auto position = static_cast<std::int32_t>(top & 0xffffffffU);
    Scratch::Symbol& left = symbols[static_cast<std::size_t>(position)];
    if (left.id < 0 || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    // An entry is stale when a neighbour has changed since: its pair then has another rank, or none.
    const std::optional<std::uint64_t> merge =
        merges_.Find(static_cast<std::uint32_t>(left.id), static_cast<std::uint32_t>(right.id));
    if (!merge || *merge >> 32 != top >> 32) continue;

    left.id = static_cast<std::int32_t>(*merge & 0xffffffffU);
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = position;
    const std::int32_t neighbours[] = {left.previous, position};
    for (const std::int32_t start : neighbours) {
      if (start < 0) continue;
      const std::size_t before = heap.size();
      PushPair(start, scratch);
      if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  }
  for (std::int32_t i = n > 0 ? 0 : -1; i >= 0; i = symbols[static_cast<std::size_t>(i)].next) {
    ids->push_back(symbols[static_cast<std::size_t>(i)].id);
  }
}

}  // namespace zeroc
