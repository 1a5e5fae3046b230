// Caches that keep every token in fewer bits: none (bf16, the control), fp8, int8, KIVI and HACK.
//
// KIVI (arXiv 2402.02750): keys per channel in groups of 32 tokens, values per token in groups of 32 channels, affine
// codes, scale and zero in half precision. The newest tokens are exact: keys until 128 of them have gathered and are
// quantised together, values for 128 tokens. The prompt attends exactly, then is quantised.
//
// fp8: E4M3 with scale 1, as vLLM without calibrated scales. int8: one half-precision scale per token and head. The
// prompt attends exactly; a decoded token is stored first, then read.
//
// HACK (SIGCOMM 2025): 2-bit affine codes, keys in partitions of 64 coordinates, values per channel in partitions of 64
// tokens, queries and probabilities in 8 bits over the same partitions, products on integers. The newest, unfilled
// value partition is exact. Both phases attend on codes. Codes are rounded to nearest (the least error). The product of
// affine codes equals the product of the numbers that they stand for (quantized_caches_test.cc shows it on integers),
// which is how it is computed here.
#pragma once

#include <memory>

#include "libzeroc/baselines/cache_attention.h"

namespace zeroc {

inline constexpr int kKiviGroup = 32;
inline constexpr int kKiviResidual = 128;  // tokens
inline constexpr int kHackPartition = 64;

std::unique_ptr<SequenceAttention> NewExactCache(const CacheShape& shape, int max_tokens);
std::unique_ptr<SequenceAttention> NewFp8Cache(const CacheShape& shape, int max_tokens);
std::unique_ptr<SequenceAttention> NewInt8Cache(const CacheShape& shape, int max_tokens);
std::unique_ptr<SequenceAttention> NewKiviCache(const CacheShape& shape, int max_tokens, int bits);
std::unique_ptr<SequenceAttention> NewHackCache(const CacheShape& shape, int max_tokens);

}  // namespace zeroc
