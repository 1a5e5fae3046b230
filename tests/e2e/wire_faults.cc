// A bad network for tests: preloaded into a worker (LD_PRELOAD), it delays, corrupts or cuts what the process sends in
// large pieces, which are keys and values; RPCs and the transport's own messages are smaller and pass.
//
// ZEROC_WIRE_FAULTS names a file that is read before every large send:
//   delay MICROSECONDS   every one waits so long: a slow link
//   corrupt N            in the next N one bit is turned over on its way; the sender's memory stays as it is
//   cut N                the next N shut their connection down instead
// or before every connection that is made over IPv4:
//   redirect PORT TO     it leads to this machine's port TO instead, but for those to PORT: an address that is wrong
// and anything else does nothing. "Next" counts from the last change of the file.
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

namespace {

constexpr std::size_t kLargeBytes = 2048;

enum class Fault { kNone, kCorrupt, kCut };

constexpr std::size_t kTextBytes = 64;

// What the file says.
void ReadFaults(char (&text)[kTextBytes]) {
  text[0] = '\0';
  const char* path = std::getenv("ZEROC_WIRE_FAULTS");
  const int fd = path != nullptr ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (fd < 0) return;
  const ssize_t n = read(fd, text, kTextBytes - 1);
  text[n > 0 ? n : 0] = '\0';
  close(fd);
}

// What is to happen to the next large send; waits for a delay.
Fault NextFault() {
  static std::mutex mu;
  static char last[kTextBytes];
  static long n_left = 0;
  char text[kTextBytes];
  ReadFaults(text);
  long number = 0;
  if (std::sscanf(text, "delay %ld", &number) == 1) usleep(static_cast<useconds_t>(number));
  const std::lock_guard<std::mutex> hold(mu);
  const bool changed = std::strcmp(text, last) != 0;
  if (changed) std::memcpy(last, text, sizeof text);
  const bool corrupt = std::sscanf(text, "corrupt %ld", &number) == 1;
  const bool cut = !corrupt && std::sscanf(text, "cut %ld", &number) == 1;
  if (changed) n_left = corrupt || cut ? number : 0;
  if (n_left == 0) return Fault::kNone;
  --n_left;
  return corrupt ? Fault::kCorrupt : Fault::kCut;
}

template <typename Function>
Function* Real(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

ssize_t RealSend(int fd, const void* data, std::size_t bytes, int flags) {
  static auto* const real = Real<ssize_t(int, const void*, std::size_t, int)>("send");
  return real(fd, data, bytes, flags);
}

// The call's result when it has been answered here.
std::optional<ssize_t> Interfere(int fd, const iovec* vectors, std::size_t n_vectors, int flags) {
  std::vector<char> copy;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < n_vectors; ++i) bytes += vectors[i].iov_len;
  if (bytes < kLargeBytes) return std::nullopt;
  constexpr std::string_view kHttp = "HTTP/1.1 ";  // /metrics is large too
  const bool is_http =
      vectors[0].iov_len >= kHttp.size() && std::memcmp(vectors[0].iov_base, kHttp.data(), kHttp.size()) == 0;
  if (is_http) return std::nullopt;
  const Fault fault = NextFault();
  if (fault == Fault::kNone) return std::nullopt;
  if (fault == Fault::kCut) {
    shutdown(fd, SHUT_RDWR);
    errno = ECONNRESET;
    return -1;
  }
  for (std::size_t i = 0; i < n_vectors; ++i) {
    const auto* begin = static_cast<const char*>(vectors[i].iov_base);
    copy.insert(copy.end(), begin, begin + vectors[i].iov_len);
  }
  copy[bytes - bytes / 8] ^= 0x10;  // near the end: headers come first
  return RealSend(fd, copy.data(), bytes, flags);
}

}  // namespace

extern "C" {

ssize_t send(int fd, const void* data, std::size_t bytes, int flags) {
  const iovec vector{const_cast<void*>(data), bytes};
  const auto result = Interfere(fd, &vector, 1, flags);
  return result.has_value() ? *result : RealSend(fd, data, bytes, flags);
}

ssize_t sendmsg(int fd, const msghdr* message, int flags) {
  static auto* const real = Real<ssize_t(int, const msghdr*, int)>("sendmsg");
  const auto result = Interfere(fd, message->msg_iov, message->msg_iovlen, flags);
  return result.has_value() ? *result : real(fd, message, flags);
}

int connect(int fd, const sockaddr* address, socklen_t bytes) {
  static auto* const real = Real<int(int, const sockaddr*, socklen_t)>("connect");
  char text[kTextBytes];
  ReadFaults(text);
  unsigned except = 0, to = 0;
  if (std::sscanf(text, "redirect %u %u", &except, &to) != 2 || address->sa_family != AF_INET) {
    return real(fd, address, bytes);
  }
  sockaddr_in other;
  std::memcpy(&other, address, sizeof other);
  if (ntohs(other.sin_port) == except) return real(fd, address, bytes);
  other.sin_port = htons(static_cast<std::uint16_t>(to));
  other.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return real(fd, reinterpret_cast<const sockaddr*>(&other), sizeof other);
}

}  // extern "C"
