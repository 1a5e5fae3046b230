// Small file helpers of the checkpoint module: bounded reads, read-only maps, atomic writes, quoting of foreign names.
// Thread-safe: no shared state. Every failure is a Status that names the path.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc::internal {

// The name in double quotes, bytes outside printable ASCII as \xHH, cut after 80 bytes: safe in any message or log.
std::string Quoted(std::string_view name);

// The whole file. kNotFound, or kInvalidArgument when it is longer than bytes_max or not a regular file.
Result<std::string> ReadFile(const std::string& path, std::size_t bytes_max);

bool FileExists(const std::string& path);

// A private read-only map of a whole regular file. Truncating the file while it is mapped kills the reader (SIGBUS),
// as with every mmap: replace checkpoints by rename.
class MappedFile {
 public:
  static Result<std::unique_ptr<MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, std::size_t size) : data_(data), size_(size) {}
  const std::byte* data_;
  std::size_t size_;
};

// Writes `parts` one after the other to a temporary file beside `path`, syncs it, renames it over `path` and syncs the
// directory: readers see the old file or the whole new one. The temporary file is removed on failure.
Status WriteFileAtomically(const std::string& path, std::span<const std::span<const std::byte>> parts);

}  // namespace zeroc::internal
