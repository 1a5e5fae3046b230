#include "libzeroc/engine/base_logits.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "libzeroc/base/check.h"

namespace zeroc {
namespace {

constexpr std::size_t kHeaderBytes = 64;  // "zeroc-logits 1 " and the key, padded with zeros
constexpr char kMagic[] = "zeroc-logits 1 ";

Status FileError(const std::string& path, const char* what, int error) {
  const std::string message = path + ": " + what + ": " + std::strerror(error);
  if (error == ENOENT || error == ENOTDIR) return NotFound(message);
  if (error == ENOSPC || error == EFBIG || error == ENOMEM) return ResourceExhausted(message);
  return Unavailable(message);
}

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

std::string Header(const std::string& key) {
  std::string header = kMagic + key;
  ZEROC_CHECK(header.size() <= kHeaderBytes, header.size());
  header.resize(kHeaderBytes, '\0');
  return header;
}

}  // namespace

BaseLogits::BaseLogits(std::string path, std::int64_t n_rows, std::int64_t vocab_size)
    : path_(std::move(path)),
      n_rows_(n_rows),
      vocab_size_(vocab_size),
      bytes_(kHeaderBytes + static_cast<std::size_t>(n_rows * vocab_size) * sizeof(float)) {}

BaseLogits::~BaseLogits() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

Result<std::unique_ptr<BaseLogits>> BaseLogits::Open(const std::string& path, const std::string& key,
                                                     std::int64_t n_rows, std::int64_t vocab_size) {
  ZEROC_CHECK(n_rows >= 1 && vocab_size >= 1, n_rows, vocab_size);
  std::unique_ptr<BaseLogits> logits(new BaseLogits(path, n_rows, vocab_size));
  const bool exists = ::access(path.c_str(), F_OK) == 0;
  ZEROC_RETURN_IF_ERROR(exists ? logits->OpenExisting(key) : logits->CreateNew(key));
  return logits;
}

Status BaseLogits::OpenExisting(const std::string& key) {
  const File file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info = {};
  if (file.get() < 0 || ::fstat(file.get(), &info) != 0) return FileError(path_, "open", errno);
  if (!S_ISREG(info.st_mode)) return InvalidArgument(path_ + ": not a regular file");
  const std::string wanted = Header(key);
  std::string found(kHeaderBytes, '\0');
  const ssize_t n = ::pread(file.get(), found.data(), kHeaderBytes, 0);
  if (n != static_cast<ssize_t>(kHeaderBytes) || found != wanted ||
      static_cast<std::uint64_t>(info.st_size) != bytes_) {
    return FailedPrecondition(path_ +
                              ": not the uncompressed logits of this model, text, windows and instruction set; remove "
                              "it or name another file");
  }
  ZEROC_RETURN_IF_ERROR(Map(file.get(), false));
  complete_ = true;
  return OkStatus();
}

Status BaseLogits::CreateNew(const std::string& key) {
  const std::string temporary = path_ + ".tmp-" + std::to_string(::getpid());
  const File file(::open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.get() < 0) return FileError(temporary, "create", errno);
  temporary_ = temporary;
  // Taken now: a full disk is an error here, not a SIGBUS at some row.
  if (const int error = ::posix_fallocate(file.get(), 0, static_cast<off_t>(bytes_)); error != 0) {
    return FileError(temporary, "make room", error);
  }
  ZEROC_RETURN_IF_ERROR(Map(file.get(), true));
  std::memcpy(data_, Header(key).data(), kHeaderBytes);
  return OkStatus();
}

Status BaseLogits::Map(int file, bool writable) {
  void* const data = ::mmap(nullptr, bytes_, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                            writable ? MAP_SHARED : MAP_PRIVATE, file, 0);
  if (data == MAP_FAILED) return FileError(path_, "mmap", errno);
  data_ = static_cast<std::byte*>(data);
  return OkStatus();
}

float* BaseLogits::At(std::int64_t row) const {
  ZEROC_CHECK(row >= 0 && row < n_rows_, row, n_rows_);
  return reinterpret_cast<float*>(data_ + kHeaderBytes) + row * vocab_size_;
}

std::span<const float> BaseLogits::Row(std::int64_t row) const {
  return {At(row), static_cast<std::size_t>(vocab_size_)};
}

void BaseLogits::Write(std::int64_t row, const float* logits) {
  ZEROC_CHECK(!complete_);
  std::copy_n(logits, vocab_size_, At(row));
}

Status BaseLogits::Finish() {
  ZEROC_CHECK(!complete_ && !temporary_.empty());
  if (::msync(data_, bytes_, MS_SYNC) != 0) return FileError(temporary_, "write", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) return FileError(path_, "rename", errno);
  temporary_.clear();
  complete_ = true;
  return OkStatus();
}

}  // namespace zeroc
