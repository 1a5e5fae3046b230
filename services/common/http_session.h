// One HTTP connection: reads a request, hands it out as an exchange, writes the answer, goes on to the next.
//
// Internal to the HTTP server (includes Beast). All state belongs to the connection's strand; the exchange's calls are
// posted there. The owner keeps the session alive until Forget.
#pragma once

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "services/common/http_server.h"
#include "services/common/http_stream.h"

namespace zeroc {

namespace internal {

class HttpSession;

class HttpSessionOwner {
 public:
  virtual ~HttpSessionOwner() = default;
  virtual void Dispatch(std::shared_ptr<HttpExchange> exchange) = 0;
  virtual HttpServer::Screening Screen(const HttpRequest& head) = 0;
  virtual HttpResponse FormatError(int status, std::string_view message) = 0;
  virtual void Forget(HttpSession* session) = 0;
  virtual bool stopping() const = 0;  // no request after the present one
};

class HttpSession : public std::enable_shared_from_this<HttpSession> {
 public:
  // tls null: plain HTTP.
  HttpSession(std::shared_ptr<asio::io_context> io, tcp::socket socket, asio::ssl::context* tls,
              const HttpLimits& limits, HttpSessionOwner& owner);

  void Start();
  void CloseSoon();
  void CloseIfIdleSoon();

  // The exchange's calls, from any thread. `exchange_id` tells a late call for an answered request from one for this
  // one.
  void PostRespond(std::uint64_t exchange_id, HttpResponse response);
  void PostStartStream(std::uint64_t exchange_id, HttpResponse head);
  void PostWrite(std::uint64_t exchange_id, std::string bytes);
  void PostEnd(std::uint64_t exchange_id, bool whole);
  void PostOnGone(std::uint64_t exchange_id, std::function<void()> gone);
  void PostTask(std::function<void()> task);
  void PostDropped(std::uint64_t exchange_id);

 private:
  enum class State { kIdle, kReading, kHandling, kStreaming, kEnding, kLingering, kClosed };
  using ErrorCode = boost::system::error_code;

  void ReadSome();
  void OnSome(const ErrorCode& error, std::size_t n_bytes);
  void ReadRequest();
  void OnHeader(const ErrorCode& error);
  bool Screened();
  void ReadBody();
  void OnRequest(const ErrorCode& error);
  void RefuseRequest(const ErrorCode& error);

  void Respond(HttpResponse response);
  std::string Head(const HttpResponse& response, std::optional<std::size_t> content_length) const;
  void Flush();
  void WriteSome();
  void OnWritten(const ErrorCode& error, std::size_t n_bytes);
  void EndExchange();
  void Linger();
  void Drain();
  void Gone();
  void Close();

  void Arm(asio::steady_timer& timer, std::int64_t ms);
  template <typename F>
  void Post(std::uint64_t exchange_id, F f);

  const std::shared_ptr<asio::io_context> io_;
  HttpStream stream_;
  const HttpLimits& limits_;
  HttpSessionOwner& owner_;
  asio::steady_timer read_timer_;
  asio::steady_timer write_timer_;
  boost::beast::flat_buffer buffer_;
  std::optional<boost::beast::http::request_parser<boost::beast::http::string_body>> parser_;

  State state_ = State::kIdle;
  bool read_pending_ = false;
  std::uint64_t exchange_id_ = 0;
  bool head_only_ = false;
  bool chunked_ = true;
  bool keep_alive_ = true;
  std::function<void()> on_gone_;
  HttpServer::Screening screening_;  // of the present request
  std::string out_waiting_;          // next write
  std::size_t largest_waiting_ = 0;  // bytes of its largest piece
  std::string out_writing_;          // under way, empty when none
  std::size_t n_written_ = 0;        // bytes of it that the client's side has taken
  std::string peer_;
  std::array<char, 4096> thrown_away_{};
};

}  // namespace internal
}  // namespace zeroc
