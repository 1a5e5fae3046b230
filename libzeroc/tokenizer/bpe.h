// Byte-pair encoding of one word: repeatedly joins the adjacent pair whose merge has the lowest rank, leftmost first
// (Sennrich et al., arXiv 1508.07909, over bytes).
//
// Const after Create and thread-safe; each thread brings its own scratch.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "libzeroc/tokenizer/pair_map.h"

namespace zeroc {

struct BpeMerge {
  int left;
  int right;
  int result;
};

class Bpe {
 public:
  // Reused between words, so that a word costs no allocation.
  class Scratch {
    friend class Bpe;
    struct Symbol {
      std::int32_t id;  // -1 once it is joined to its left neighbour
      std::int32_t previous;
      std::int32_t next;
    };
    std::vector<Symbol> symbols;
    std::vector<std::uint64_t> heap;  // rank << 32 | position of the left symbol; smallest on top
  };

  // byte_ids[b] is the token of byte b; merges stand in order of rank, a repeated pair takes its last rank.
  Bpe(const std::array<int, 256>& byte_ids, std::span<const BpeMerge> merges);

  int ByteId(char byte) const { return byte_ids_[static_cast<unsigned char>(byte)]; }

  // Appends the ids of a word of at most 2^30 bytes. Time O(n log n), memory about 40 bytes per byte of the word.
  void Encode(std::string_view word, Scratch* scratch, std::vector<int>* ids) const;

 private:
  void PushPair(std::int32_t left, Scratch* scratch) const;

  std::array<int, 256> byte_ids_;
  PairMap merges_;  // (left id, right id) -> rank << 32 | result id
};

}  // namespace zeroc
