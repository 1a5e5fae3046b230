// XXH3-128 over values in one agreed form: what identities and checksums are computed from, on any machine.
//
// Integers are little-endian, floats their IEEE 754 bits, strings and arrays carry their length first, so that no two
// contents give the same stream. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

struct XXH3_state_s;

namespace zeroc {

class CanonicalHash {
 public:
  CanonicalHash();

  void Int(std::int64_t value);
  void Text(std::string_view value);
  void Floats(std::span<const float> values);
  void Bytes(std::string_view value);  // no length in front: the plain XXH3 of a file

  std::string Hex() const;      // 32 digits, the high half first
  std::uint64_t Low64() const;  // the low half

 private:
  struct Free {
    void operator()(XXH3_state_s* state) const;
  };
  std::unique_ptr<XXH3_state_s, Free> state_;
};

}  // namespace zeroc
