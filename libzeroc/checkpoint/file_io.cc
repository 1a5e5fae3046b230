#include "libzeroc/checkpoint/file_io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

namespace zeroc::internal {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }
  int Close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

Status ErrnoStatus(const std::string& path, std::string_view operation, int error) {
  const StatusCode code = error == ENOENT                      ? StatusCode::kNotFound
                          : error == EACCES || error == EPERM  ? StatusCode::kPermissionDenied
                          : error == ENOSPC || error == EMFILE ? StatusCode::kResourceExhausted
                                                               : StatusCode::kFailedPrecondition;
  return Status(code, path + ": " + std::string(operation) + ": " + std::generic_category().message(error));
}

// The size of a regular file that is open.
Result<std::size_t> RegularFileSize(const std::string& path, int fd) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return ErrnoStatus(path, "stat", errno);
  if (!S_ISREG(info.st_mode)) return InvalidArgument(path + ": not a regular file");
  return static_cast<std::size_t>(info.st_size);
}

Status WriteAll(const std::string& path, int fd, std::span<const std::byte> bytes) {
  constexpr std::size_t kPieceBytes = std::size_t{1} << 30;  // Linux writes at most 2 GiB in one call
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), std::min(bytes.size(), kPieceBytes));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(path, "write", errno);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return OkStatus();
}

Status WriteAndSync(const std::string& path, std::span<const std::span<const std::byte>> parts) {
  FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.get() < 0) return ErrnoStatus(path, "create", errno);
  for (const auto& part : parts) ZEROC_RETURN_IF_ERROR(WriteAll(path, file.get(), part));
  if (::fsync(file.get()) != 0) return ErrnoStatus(path, "fsync", errno);
  if (file.Close() != 0) return ErrnoStatus(path, "close", errno);
  return OkStatus();
}

}  // namespace

std::string Quoted(std::string_view name) {
  constexpr std::size_t kShownBytes = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : name.substr(0, kShownBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f && c != '"' && c != '\\') {
      out += c;
    } else {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    }
  }
  return out + (name.size() > kShownBytes ? "...\"" : "\"");
}

bool FileExists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

Result<std::string> ReadFile(const std::string& path, std::size_t bytes_max) {
  // O_NONBLOCK: a FIFO planted under the name must not hang us before fstat refuses it.
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) return ErrnoStatus(path, "open", errno);
  ZEROC_ASSIGN_OR_RETURN(const std::size_t size, RegularFileSize(path, file.get()));
  if (size > bytes_max) {
    return InvalidArgument(path + ": " + std::to_string(size) + " bytes, more than the limit of " +
                           std::to_string(bytes_max));
  }
  std::string text(size, '\0');
  std::size_t done = 0;
  while (done < size) {
    const ssize_t n = ::read(file.get(), text.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(path, "read", errno);
    if (n == 0) return DataLoss(path + ": the file shrank while it was read");
    done += static_cast<std::size_t>(n);
  }
  return text;
}

Result<std::unique_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) return ErrnoStatus(path, "open", errno);
  ZEROC_ASSIGN_OR_RETURN(const std::size_t size, RegularFileSize(path, file.get()));
  if (size == 0) return InvalidArgument(path + ": the file is empty");
  void* const data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) return ErrnoStatus(path, "mmap", errno);
  return std::unique_ptr<MappedFile>(new MappedFile(static_cast<const std::byte*>(data), size));
}

MappedFile::~MappedFile() { ::munmap(const_cast<std::byte*>(data_), size_); }

Status WriteFileAtomically(const std::string& path, std::span<const std::span<const std::byte>> parts) {
  static std::atomic<unsigned> counter{0};
  const std::string temporary =
      path + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter.fetch_add(1));
  Status status = WriteAndSync(temporary, parts);
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0) status = ErrnoStatus(path, "rename", errno);
  if (!status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  std::filesystem::path directory = std::filesystem::path(path).parent_path();
  if (directory.empty()) directory = ".";
  FileDescriptor folder(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0 || ::fsync(folder.get()) != 0) return ErrnoStatus(directory, "fsync", errno);
  return OkStatus();
}

}  // namespace zeroc::internal
