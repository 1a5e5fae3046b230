// The logits of no compression for every scored token of a text, kept in a file: computed once, compared with by every
// method and profile that is measured after it.
//
// A file belongs to one key, a hash over whatever the logits depend on (ScoreText makes it); with another key, another
// size or cut short it is refused, never used. A new file appears under its name only when Finish says that every row
// is there, so an interrupted run leaves nothing that a later one could take for whole. Rows are float32 [vocab_size]
// in this machine's byte order. Rows may be written and read from several threads, each row by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "libzeroc/base/status.h"

namespace zeroc {

class BaseLogits {
 public:
  // An existing file is opened for reading (kFailedPrecondition when it is not of this key and shape); otherwise room
  // for n_rows rows is made beside `path`. kNotFound, kResourceExhausted or kUnavailable as the file system says.
  static Result<std::unique_ptr<BaseLogits>> Open(const std::string& path, const std::string& key, std::int64_t n_rows,
                                                  std::int64_t vocab_size);
  ~BaseLogits();  // without Finish, what was written is removed
  BaseLogits(const BaseLogits&) = delete;
  BaseLogits& operator=(const BaseLogits&) = delete;

  // Every row is there: read only. Otherwise the caller writes them all, then calls Finish.
  bool complete() const { return complete_; }

  // row in [0, n_rows).
  std::span<const float> Row(std::int64_t row) const;
  void Write(std::int64_t row, const float* logits);  // not when complete()

  Status Finish();

 private:
  BaseLogits(std::string path, std::int64_t n_rows, std::int64_t vocab_size);
  Status OpenExisting(const std::string& key);
  Status CreateNew(const std::string& key);
  Status Map(int file, bool writable);
  float* At(std::int64_t row) const;

  std::string path_;
  std::string temporary_;  // empty when nothing is being written
  std::int64_t n_rows_;
  std::int64_t vocab_size_;
  std::byte* data_ = nullptr;
  std::size_t bytes_;
  bool complete_ = false;
};

}  // namespace zeroc
