#include "libzeroc/checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "libzeroc/checkpoint/file_io.h"

namespace zeroc {
namespace {

using internal::Quoted;

struct DTypeInfo {
  std::string_view name;
  std::size_t bytes;
};
// Indexed by DType.
constexpr std::array<DTypeInfo, 10> kDTypes = {{{"F32", 4},
                                                {"F16", 2},
                                                {"BF16", 2},
                                                {"F64", 8},
                                                {"I64", 8},
                                                {"I32", 4},
                                                {"I16", 2},
                                                {"I8", 1},
                                                {"U8", 1},
                                                {"BOOL", 1}}};

std::optional<DType> ParseDType(std::string_view name) {
  for (std::size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

struct HeaderEntry {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

// Reads the header event by event: nothing is built that the format does not allow, so a hostile header costs no more
// memory than its own length. Each event returns false, with status() set, to stop the parser.
class HeaderReader {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  Status status() const { return status_; }
  std::map<std::string, HeaderEntry, std::less<>>& entries() { return entries_; }
  std::map<std::string, std::string>& metadata() { return metadata_; }

  bool null() { return Unexpected("null"); }
  bool boolean(bool) { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t) { return Unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) { return Unexpected("a fractional or too large number"); }
  bool binary(binary_t&) { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) {
    if (place_ == Place::kShape) {
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return Fail("a dimension is too large");
      }
      if (entry_.shape.size() == internal::kRankMax) {
        return Fail("more than " + std::to_string(internal::kRankMax) + " dimensions");
      }
      entry_.shape.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (place_ == Place::kOffsets) {
      if (n_offsets_ == 2) return Fail("data_offsets has more than two values");
      (n_offsets_++ == 0 ? entry_.begin : entry_.end) = value;
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) {
    if (place_ == Place::kMetadata && has_key_) {
      has_key_ = false;
      if (!metadata_.emplace(key_, std::move(value)).second) return Fail("metadata key " + Quoted(key_) + " twice");
      return true;
    }
    if (place_ == Place::kTensor && key_ == "dtype") {
      const std::optional<DType> dtype = ParseDType(value);
      if (!dtype) return FailWith(StatusCode::kUnimplemented, "dtype " + Quoted(value) + " is not supported");
      entry_.dtype = *dtype;
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(std::size_t) {
    if (place_ == Place::kStart) {
      place_ = Place::kTop;
      return true;
    }
    if (place_ != Place::kTop) return Unexpected("an object");
    if (name_ == internal::kMetadataKey) {
      place_ = Place::kMetadata;
      return true;
    }
    place_ = Place::kTensor;
    entry_ = HeaderEntry{};
    seen_dtype_ = seen_shape_ = seen_offsets_ = false;
    return true;
  }

  bool key(string_t& value) {
    if (place_ == Place::kTop) return StartEntry(value);
    key_ = std::move(value);
    if (place_ == Place::kMetadata) {
      has_key_ = true;
      return true;
    }
    bool* const seen = key_ == "dtype"          ? &seen_dtype_
                       : key_ == "shape"        ? &seen_shape_
                       : key_ == "data_offsets" ? &seen_offsets_
                                                : nullptr;
    if (seen == nullptr) return Fail("unknown key " + Quoted(key_));
    if (std::exchange(*seen, true)) return Fail("key " + Quoted(key_) + " twice");
    return true;
  }

  bool end_object() {
    if (place_ == Place::kTensor) {
      if (!seen_dtype_ || !seen_shape_ || !seen_offsets_) return Fail("dtype, shape or data_offsets is missing");
      entries_[name_] = std::move(entry_);
    }
    place_ = place_ == Place::kTop ? Place::kEnd : Place::kTop;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != Place::kTensor || key_ == "dtype") return Unexpected("an array");
    place_ = key_ == "shape" ? Place::kShape : Place::kOffsets;
    n_offsets_ = 0;
    return true;
  }

  bool end_array() {
    if (place_ == Place::kOffsets && n_offsets_ != 2) return Fail("data_offsets has fewer than two values");
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
    status_ = InvalidArgument("header is not valid JSON at byte " + std::to_string(position));
    return false;
  }

 private:
  enum class Place { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kEnd };

  bool StartEntry(string_t& name) {
    name_ = std::move(name);
    if (name_ == internal::kMetadataKey) {
      if (std::exchange(seen_metadata_, true)) return Fail("given twice");
      return true;
    }
    if (entries_.size() == internal::kTensorsMax) {
      return Fail("more than " + std::to_string(internal::kTensorsMax) + " tensors");
    }
    if (!entries_.emplace(name_, HeaderEntry{}).second) return Fail("given twice");
    return true;
  }

  bool FailWith(StatusCode code, const std::string& cause) {
    status_ = Status(code, place_ == Place::kStart ? "header: " + cause : "entry " + Quoted(name_) + ": " + cause);
    return false;
  }
  bool Fail(const std::string& cause) { return FailWith(StatusCode::kInvalidArgument, cause); }
  bool Unexpected(const std::string& what) {
    const bool in_entry = place_ != Place::kStart && place_ != Place::kTop;
    return Fail(what + " is not allowed here" + (in_entry ? " (key " + Quoted(key_) + ")" : std::string()));
  }

  Place place_ = Place::kStart;
  std::string name_;  // of the entry being read
  std::string key_;   // inside the entry
  HeaderEntry entry_;
  int n_offsets_ = 0;
  bool has_key_ = false;
  bool seen_metadata_ = false;
  bool seen_dtype_ = false;
  bool seen_shape_ = false;
  bool seen_offsets_ = false;
  std::map<std::string, HeaderEntry, std::less<>> entries_;
  std::map<std::string, std::string> metadata_;
  Status status_;
};

// Each tensor fits its own extent, and the extents tile the data exactly.
Status CheckExtents(const std::map<std::string, HeaderEntry, std::less<>>& entries, std::size_t data_bytes) {
  std::vector<const std::pair<const std::string, HeaderEntry>*> order;
  order.reserve(entries.size());
  for (const auto& item : entries) {
    const HeaderEntry& entry = item.second;
    if (entry.begin > entry.end || entry.end > data_bytes) {
      return InvalidArgument("entry " + Quoted(item.first) + ": data_offsets [" + std::to_string(entry.begin) + ", " +
                             std::to_string(entry.end) + "] outside the " + std::to_string(data_bytes) +
                             " data bytes of the file");
    }
    std::size_t bytes = 0;
    if (!internal::TensorBytes(entry.dtype, entry.shape, &bytes) || bytes != entry.end - entry.begin) {
      return InvalidArgument("entry " + Quoted(item.first) + ": shape " + ShapeToString(entry.shape) + " of " +
                             std::string(DTypeName(entry.dtype)) + " does not fill its " +
                             std::to_string(entry.end - entry.begin) + " bytes");
    }
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::uint64_t position = 0;
  for (const auto* item : order) {
    if (item->second.begin != position) {
      return InvalidArgument("entry " + Quoted(item->first) + ": data starts at " + std::to_string(item->second.begin) +
                             (item->second.begin < position ? ", overlapping" : ", after a hole behind") +
                             " the tensor before it, which ends at " + std::to_string(position));
    }
    position = item->second.end;
  }
  if (position != data_bytes) {
    return InvalidArgument("the tensors cover " + std::to_string(position) + " of " + std::to_string(data_bytes) +
                           " data bytes");
  }
  return OkStatus();
}

Result<std::span<const std::byte>> HeaderBytes(std::span<const std::byte> bytes) {
  if (bytes.size() < 8) return InvalidArgument(std::to_string(bytes.size()) + " bytes, too short for a header");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  if (length > internal::kHeaderBytesMax) {
    return InvalidArgument("header length " + std::to_string(length) + " is more than the format's limit of " +
                           std::to_string(internal::kHeaderBytesMax));
  }
  if (length > bytes.size() - 8) {
    return InvalidArgument("header length " + std::to_string(length) + " reaches past the end of the file (" +
                           std::to_string(bytes.size()) + " bytes)");
  }
  if (length == 0 || bytes[8] != std::byte{'{'}) return InvalidArgument("the header does not start with '{'");
  return bytes.subspan(8, length);
}

}  // namespace

std::size_t DTypeBytes(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].bytes; }
std::string_view DTypeName(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].name; }

std::string ShapeToString(std::span<const std::int64_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return out + "]";
}

bool internal::TensorBytes(DType dtype, std::span<const std::int64_t> shape, std::size_t* bytes) {
  std::size_t total = DTypeBytes(dtype);
  for (const std::int64_t dim : shape) {
    if (dim < 0 || __builtin_mul_overflow(total, static_cast<std::size_t>(dim), &total)) return false;
  }
  *bytes = total;
  return true;
}

SafetensorsFile::SafetensorsFile() = default;
SafetensorsFile::~SafetensorsFile() = default;

Result<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<internal::MappedFile> file, internal::MappedFile::Open(path));
  ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> out, Parse(file->bytes(), path));
  out->file_ = std::move(file);
  return out;
}

Result<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Parse(std::span<const std::byte> bytes,
                                                                std::string_view name) {
  const Result<std::span<const std::byte>> header = HeaderBytes(bytes);
  if (!header.ok()) return header.status().WithContext(name);
  const auto* const text = reinterpret_cast<const char*>(header->data());
  HeaderReader reader;
  if (!nlohmann::json::sax_parse(text, text + header->size(), &reader)) return reader.status().WithContext(name);

  const std::span<const std::byte> data = bytes.subspan(8 + header->size());
  ZEROC_RETURN_IF_ERROR(CheckExtents(reader.entries(), data.size()).WithContext(name));
  std::unique_ptr<SafetensorsFile> out(new SafetensorsFile());
  for (auto& [tensor_name, entry] : reader.entries()) {
    out->tensors_.emplace_hint(out->tensors_.end(), tensor_name,
                               TensorView{.dtype = entry.dtype,
                                          .shape = std::move(entry.shape),
                                          .data = data.data() + entry.begin,
                                          .bytes = static_cast<std::size_t>(entry.end - entry.begin)});
  }
  out->metadata_ = std::move(reader.metadata());
  return out;
}

const TensorView* SafetensorsFile::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> out;
  out.reserve(tensors_.size());
  for (const auto& [name, view] : tensors_) out.push_back(name);
  return out;
}

}  // namespace zeroc
