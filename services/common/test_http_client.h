// A blocking HTTP client over a plain socket, for tests: sends any bytes, reads with a time limit.
//
// Not thread-safe. Loopback only.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace zeroc {

class TestHttpClient {
 public:
  // receive_buffer > 0 makes the client's side of the connection small, for tests of slow readers.
  explicit TestHttpClient(int port, int receive_buffer = 0) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  ~TestHttpClient() { Close(); }
  TestHttpClient(const TestHttpClient&) = delete;
  TestHttpClient& operator=(const TestHttpClient&) = delete;

  bool connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }
  bool Get(const std::string& path) { return Send("GET " + path + " HTTP/1.1\r\nHost: test\r\n\r\n"); }
  bool Post(const std::string& path, const std::string& body, const std::string& headers = "") {
    return Send("POST " + path + " HTTP/1.1\r\nHost: test\r\n" + headers +
                "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
  }

  // Reads until the text contains `mark`, the peer closes or timeout_ms pass; returns all that was read and not yet
  // taken.
  std::string ReadUntil(std::string_view mark, int timeout_ms = 5000) {
    while (in_.find(mark) == std::string::npos && ReadSome(timeout_ms)) {
    }
    return in_;
  }
  // So many bytes more; false when they do not come.
  bool ReadBytes(std::size_t n_bytes, int timeout_ms = 5000) {
    const std::size_t enough = in_.size() + n_bytes;
    while (in_.size() < enough && ReadSome(timeout_ms)) {
    }
    return in_.size() >= enough;
  }
  // Everything up to the close; at_end() says whether it came.
  std::string ReadAll(int timeout_ms = 5000) {
    while (ReadSome(timeout_ms)) {
    }
    return in_;
  }
  // One response with a Content-Length.
  std::string ReadResponse(int timeout_ms = 5000) {
    ReadUntil("\r\n\r\n", timeout_ms);
    const std::size_t head = in_.find("\r\n\r\n");
    const std::size_t length = in_.find("Content-Length: ");
    if (head == std::string::npos || length == std::string::npos || length > head) return in_;
    const std::size_t total = head + 4 + std::stoul(in_.substr(length + 16));
    while (in_.size() < total && ReadSome(timeout_ms)) {
    }
    std::string response = in_.substr(0, total);
    in_.erase(0, total);
    return response;
  }
  bool at_end() const { return at_end_; }

 private:
  bool ReadSome(int timeout_ms) {
    pollfd wait{fd_, POLLIN, 0};
    if (fd_ < 0 || at_end_ || poll(&wait, 1, timeout_ms) != 1) return false;
    char buffer[4096];
    const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
    if (n <= 0) at_end_ = true;
    if (n > 0) in_.append(buffer, static_cast<std::size_t>(n));
    return n > 0;
  }

  int fd_;
  bool connected_ = false;
  bool at_end_ = false;
  std::string in_;
};

}  // namespace zeroc
