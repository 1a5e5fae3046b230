// The bytes of one HTTP connection, plain or TLS, behind one type that Beast can read and write.
//
// Internal to the HTTP server. Not thread-safe: everything on the connection's strand.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <optional>
#include <utility>

namespace zeroc {

namespace asio = boost::asio;
using tcp = asio::ip::tcp;

namespace internal {

class HttpStream {
 public:
  using executor_type = tcp::socket::executor_type;

  // context null: plain. It outlives the stream.
  HttpStream(tcp::socket socket, asio::ssl::context* context) : socket_(std::move(socket)) {
    if (context != nullptr) tls_.emplace(socket_, *context);
  }

  executor_type get_executor() { return socket_.get_executor(); }
  tcp::socket& socket() { return socket_; }
  bool is_tls() const { return tls_.has_value(); }

  template <typename Handler>
  void async_handshake(Handler&& handler) {
    tls_->async_handshake(asio::ssl::stream_base::server, std::forward<Handler>(handler));
  }
  template <typename Buffers, typename Handler>
  void async_read_some(const Buffers& buffers, Handler&& handler) {
    if (tls_.has_value()) return tls_->async_read_some(buffers, std::forward<Handler>(handler));
    socket_.async_read_some(buffers, std::forward<Handler>(handler));
  }
  template <typename Buffers, typename Handler>
  void async_write_some(const Buffers& buffers, Handler&& handler) {
    if (tls_.has_value()) return tls_->async_write_some(buffers, std::forward<Handler>(handler));
    socket_.async_write_some(buffers, std::forward<Handler>(handler));
  }
  // Tells the peer that nothing more comes; a TLS peer may answer that, and what it answers is not looked at.
  template <typename Handler>
  void async_end(Handler&& handler) {
    const auto end_sending = [this] {
      boost::system::error_code ignored;
      socket_.shutdown(tcp::socket::shutdown_send, ignored);
    };
    if (tls_.has_value()) {
      return tls_->async_shutdown([end_sending, handler = std::forward<Handler>(handler)](const auto&) mutable {
        end_sending();
        handler();
      });
    }
    end_sending();
    handler();
  }

 private:
  tcp::socket socket_;
  std::optional<asio::ssl::stream<tcp::socket&>> tls_;
};

}  // namespace internal
}  // namespace zeroc
