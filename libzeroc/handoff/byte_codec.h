// Little-endian writing and bounds-checked reading of the hand-off's byte formats. Header-only, no allocation on the
// reading side beyond what the bytes themselves hold. A reader that ran past the end stays failed and gives zeros, so a
// parser checks once, at its end (and before it sizes a container by a count it has read).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace zeroc {

class ByteWriter {
 public:
  template <typename T>
  void Int(T value) {
    static_assert(std::is_integral_v<T>);
    auto bits = static_cast<std::make_unsigned_t<T>>(value);
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      bytes_.push_back(static_cast<char>(bits & 0xff));
      if constexpr (sizeof(T) > 1) bits = static_cast<decltype(bits)>(bits >> 8);
    }
  }
  void Float(float value) { Int(std::bit_cast<std::uint32_t>(value)); }
  // At most 65535 bytes; longer text is cut, callers bound it where that matters.
  void Text(std::string_view text) {
    text = text.substr(0, 0xffff);
    Int(static_cast<std::uint16_t>(text.size()));
    bytes_.append(text);
  }

  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  T Int() {
    static_assert(std::is_integral_v<T>);
    if (!Need(sizeof(T))) return T{};
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      bits |= std::uint64_t{std::to_integer<std::uint8_t>(bytes_[at_ + i])} << (8 * i);
    }
    at_ += sizeof(T);
    return static_cast<T>(bits);
  }
  float Float() { return std::bit_cast<float>(Int<std::uint32_t>()); }
  std::string Text(std::size_t bytes_max) {
    const std::size_t n = Int<std::uint16_t>();
    if (n > bytes_max || !Need(n)) {
      failed_ = true;
      return {};
    }
    std::string text(reinterpret_cast<const char*>(bytes_.data()) + at_, n);
    at_ += n;
    return text;
  }

  // Whether n records of record_bytes are there: ask before allocating for them.
  bool Holds(std::uint64_t n, std::size_t record_bytes) const {
    return !failed_ && n <= (bytes_.size() - at_) / record_bytes;
  }
  bool failed() const { return failed_; }
  bool AtEnd() const { return !failed_ && at_ == bytes_.size(); }

 private:
  bool Need(std::size_t n) {
    if (failed_ || bytes_.size() - at_ < n) failed_ = true;
    return !failed_;
  }

  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  bool failed_ = false;
};

inline std::span<const std::byte> AsBytes(std::string_view text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

}  // namespace zeroc
