// Safetensors files: named tensors behind a JSON header, read in place by mmap and written atomically. Checkpoints and
// ZeroC's plan files share this container.
//
// Format: u64 little-endian header length, the JSON header, then the data; offsets count from the start of the data
// and must cover it without hole or overlap (https://huggingface.co/docs/safetensors).
// Thread-safety: const after Open or Parse; read from any thread. Files are untrusted: every length, offset, shape and
// dtype is checked against the file's size before anything is allocated for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

namespace internal {
class MappedFile;
}

enum class DType { kF32, kF16, kBf16, kF64, kI64, kI32, kI16, kI8, kU8, kBool };

std::size_t DTypeBytes(DType dtype);
std::string_view DTypeName(DType dtype);  // the format's spelling: "BF16"

// Row-major. `data` points into memory owned by somebody else and keeps the file's alignment, which the format does not
// promise (Checkpoint::Tensor checks it).
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;  // empty for a scalar
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// "[4096, 384]"
std::string ShapeToString(std::span<const std::int64_t> shape);

using TensorMap = std::map<std::string, TensorView, std::less<>>;

class SafetensorsFile {
 public:
  // Maps the file read-only and private; the views live as long as this object. kNotFound, kInvalidArgument for a
  // malformed file, kUnimplemented for a dtype outside DType.
  static Result<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);

  // The same over memory of the caller, which must outlive this object. `name` is used in messages.
  static Result<std::unique_ptr<SafetensorsFile>> Parse(std::span<const std::byte> bytes, std::string_view name);

  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const TensorView* Find(std::string_view name) const;  // nullptr when absent
  std::vector<std::string> names() const;               // sorted
  const TensorMap& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  SafetensorsFile();
  std::unique_ptr<internal::MappedFile> file_;  // null after Parse
  TensorMap tensors_;
  std::map<std::string, std::string> metadata_;
};

// Writes the tensors, widest elements first and then by name, so that equal input gives equal bytes and every tensor is
// aligned to its element. Atomic and durable: a temporary file, fsync, rename. kInvalidArgument when bytes and shape
// disagree or a name is empty, "__metadata__" or not UTF-8.
Status WriteSafetensors(const std::string& path, const TensorMap& tensors,
                        const std::map<std::string, std::string>& metadata);

namespace internal {

// Bytes of a tensor of this shape; false when a dimension is negative or the product overflows.
bool TensorBytes(DType dtype, std::span<const std::int64_t> shape, std::size_t* bytes);

constexpr std::string_view kMetadataKey = "__metadata__";
constexpr std::size_t kHeaderBytesMax = 100'000'000;  // the format's own limit
constexpr std::size_t kTensorsMax = 1 << 18;          // mixture-of-experts checkpoints reach about 10^5
constexpr std::size_t kRankMax = 8;

}  // namespace internal
}  // namespace zeroc
