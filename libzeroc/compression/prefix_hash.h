// Names for the beginnings of prompts: one hash for every 64 tokens, each over the one before, so that the hash of a
// beginning stands for all of its tokens and for what their KV bytes depend on (model, plan, profile).
//
// Workers state the hashes of what they hold (WorkerLoad), the router computes those of a prompt and compares. A hash
// is a hint: who uses cached blocks compares the tokens themselves. Pure; any thread. Stable across processes.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace zeroc {

inline constexpr int kPrefixHashTokens = 64;  // a KV block's

// XXH3-64 of the three texts, each behind its length (u32, little-endian).
std::uint64_t PrefixHashRoot(std::string_view model_fingerprint, std::string_view plan_id, std::string_view profile);

// XXH3-64 of the parent (u64, little-endian) and 64 ids (i32, little-endian).
std::uint64_t PrefixHashNext(std::uint64_t parent, std::span<const std::int32_t> ids);

// XXH3-64 of all ids (i32, little-endian): whether two sides speak of the same prompt.
std::uint64_t PromptHash(std::span<const std::int32_t> ids);

// [i]: of the first 64 (i + 1) tokens; one for every whole block of ids.
std::vector<std::uint64_t> PrefixHashes(std::uint64_t root, std::span<const std::int32_t> ids);

}  // namespace zeroc
