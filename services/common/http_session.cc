#include "services/common/http_session.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <utility>

namespace zeroc::internal {
namespace {

namespace http = boost::beast::http;

// After the last byte of an answer that ends the connection: how long the client may take to read it before the socket
// goes.
constexpr std::int64_t kLingerMs = 2000;

std::string ChunkFrame(const std::string& bytes) {
  char head[20];
  std::snprintf(head, sizeof head, "%zx\r\n", bytes.size());
  return head + bytes + "\r\n";
}

// nullopt when a '%' is not followed by two hexadecimal digits.
std::optional<std::string> PercentDecoded(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const std::string_view digits = text.substr(i + 1, 2);
    unsigned char byte = 0;
    const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), byte, 16);
    if (digits.size() != 2 || read.ec != std::errc() || read.ptr != digits.data() + 2) return std::nullopt;
    out += static_cast<char>(byte);
    i += 2;
  }
  return out;
}

// nullopt when the path is malformed.
std::optional<HttpRequest> ToRequest(http::request<http::string_body>&& message, const std::string& peer) {
  HttpRequest request;
  request.method = std::string(message.method_string());
  const std::string target(message.target());
  const std::size_t query = target.find('?');
  std::optional<std::string> path = PercentDecoded(std::string_view(target).substr(0, query));
  if (!path.has_value()) return std::nullopt;
  request.path = std::move(*path);
  if (query != std::string::npos) request.query = target.substr(query + 1);
  for (const auto& field : message) {
    request.headers.emplace_back(std::string(field.name_string()), std::string(field.value()));
  }
  request.body = std::move(message.body());
  request.peer = peer;
  return request;
}

class Exchange : public HttpExchange {
 public:
  Exchange(std::weak_ptr<HttpSession> session, std::uint64_t id, HttpRequest request)
      : session_(std::move(session)), id_(id), request_(std::move(request)) {}
  ~Exchange() override {
    if (const auto session = session_.lock()) session->PostDropped(id_);
  }

  const HttpRequest& request() const override { return request_; }
  void Respond(HttpResponse response) override {
    if (const auto session = session_.lock()) session->PostRespond(id_, std::move(response));
  }
  void StartStream(HttpResponse head) override {
    if (const auto session = session_.lock()) session->PostStartStream(id_, std::move(head));
  }
  void Write(std::string bytes) override {
    if (const auto session = session_.lock()) session->PostWrite(id_, std::move(bytes));
  }
  void Finish() override {
    if (const auto session = session_.lock()) session->PostEnd(id_, true);
  }
  void Abort() override {
    if (const auto session = session_.lock()) session->PostEnd(id_, false);
  }
  void OnClientGone(std::function<void()> gone) override {
    if (const auto session = session_.lock()) {
      session->PostOnGone(id_, std::move(gone));
    } else {
      gone();
    }
  }
  void Post(std::function<void()> task) override {
    if (const auto session = session_.lock()) session->PostTask(std::move(task));
  }

 private:
  const std::weak_ptr<HttpSession> session_;
  const std::uint64_t id_;
  const HttpRequest request_;
};

}  // namespace

HttpSession::HttpSession(std::shared_ptr<asio::io_context> io, tcp::socket socket, asio::ssl::context* tls,
                         const HttpLimits& limits, HttpSessionOwner& owner)
    : io_(std::move(io)),
      stream_(std::move(socket), tls),
      limits_(limits),
      owner_(owner),
      read_timer_(stream_.get_executor()),
      write_timer_(stream_.get_executor()) {
  ErrorCode ignored;
  stream_.socket().set_option(tcp::no_delay(true), ignored);
  const tcp::endpoint peer = stream_.socket().remote_endpoint(ignored);
  peer_ = peer.address().to_string() + ":" + std::to_string(peer.port());
}

void HttpSession::Start() {
  asio::post(stream_.get_executor(), [self = shared_from_this()] {
    self->Arm(self->read_timer_, self->limits_.request_timeout_ms);
    if (!self->stream_.is_tls()) return self->ReadSome();
    self->stream_.async_handshake([self](const ErrorCode& error) {
      if (error) return self->Gone();
      if (self->state_ != State::kClosed) self->ReadSome();
    });
  });
}

void HttpSession::CloseSoon() {
  asio::post(stream_.get_executor(), [self = shared_from_this()] { self->Gone(); });
}

void HttpSession::CloseIfIdleSoon() {
  asio::post(stream_.get_executor(), [self = shared_from_this()] {
    if (self->state_ == State::kIdle) self->Close();
  });
}

// A timer that fires closes the connection. A handler that was queued before the timer moved on finds a later expiry.
void HttpSession::Arm(asio::steady_timer& timer, std::int64_t ms) {
  timer.expires_after(std::chrono::milliseconds(ms));
  timer.async_wait([self = shared_from_this(), &timer](const ErrorCode& error) {
    if (!error && timer.expiry() <= asio::steady_timer::clock_type::now()) self->Gone();
  });
}

// Waits for the next request, or for the client to go away while its request is being answered.
void HttpSession::ReadSome() {
  if (read_pending_ || state_ == State::kClosed) return;
  read_pending_ = true;
  stream_.async_read_some(buffer_.prepare(4096), [self = shared_from_this()](const ErrorCode& error, std::size_t n) {
    self->OnSome(error, n);
  });
}

void HttpSession::OnSome(const ErrorCode& error, std::size_t n_bytes) {
  read_pending_ = false;
  if (state_ == State::kClosed) return;
  if (error) return Gone();  // also while it lingers: this read hides the end of the connection from that of Drain
  buffer_.commit(n_bytes);
  if (state_ == State::kIdle) ReadRequest();
}

void HttpSession::ReadRequest() {
  state_ = State::kReading;
  Arm(read_timer_, limits_.request_timeout_ms);
  parser_.emplace();
  parser_->header_limit(static_cast<std::uint32_t>(limits_.header_bytes_max));
  parser_->body_limit(static_cast<std::uint64_t>(limits_.body_bytes_max));
  http::async_read_header(stream_, buffer_, *parser_,
                          [self = shared_from_this()](const ErrorCode& error, std::size_t) { self->OnHeader(error); });
}

void HttpSession::OnHeader(const ErrorCode& error) {
  if (state_ == State::kClosed) return;
  if (error) return RefuseRequest(error);
  if (!Screened()) return;
  if (!boost::beast::iequals(parser_->get()[http::field::expect], "100-continue")) return ReadBody();
  static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
  asio::async_write(stream_, asio::buffer(kContinue.data(), kContinue.size()),
                    [self = shared_from_this()](const ErrorCode& failed, std::size_t) {
                      if (failed) return self->Gone();
                      self->ReadBody();
                    });
}

// Refused requests are answered before their body is read, which is thrown away.
bool HttpSession::Screened() {
  http::request<http::string_body> head = parser_->get();
  head_only_ = head.method() == http::verb::head;
  const std::optional<HttpRequest> request = ToRequest(std::move(head), peer_);
  screening_ = request.has_value() ? owner_.Screen(*request) : HttpServer::Screening();
  if (!request.has_value()) screening_.refusal = owner_.FormatError(400, "malformed percent-encoding in the path");
  if (!screening_.refusal.has_value()) return true;
  ++exchange_id_;
  state_ = State::kHandling;
  keep_alive_ = false;
  Respond(std::move(*screening_.refusal));
  return false;
}

void HttpSession::ReadBody() {
  if (state_ == State::kClosed) return;
  http::async_read(stream_, buffer_, *parser_,
                   [self = shared_from_this()](const ErrorCode& error, std::size_t) { self->OnRequest(error); });
}

void HttpSession::RefuseRequest(const ErrorCode& error) {
  int status = 400;
  std::string message = "malformed HTTP request: " + error.message();
  if (error == http::error::header_limit) {
    status = 431;
    message = "header larger than " + std::to_string(limits_.header_bytes_max) + " bytes";
  } else if (error == http::error::body_limit) {
    status = 413;
    message = "body larger than " + std::to_string(limits_.body_bytes_max) + " bytes";
  } else if (error.category() != http::make_error_code(http::error::bad_version).category() ||
             error == http::error::end_of_stream || error == http::error::partial_message) {
    return Gone();  // the connection broke: nobody to tell
  }
  ++exchange_id_;
  state_ = State::kHandling;
  head_only_ = false;
  keep_alive_ = false;
  Respond(owner_.FormatError(status, message));
}

void HttpSession::OnRequest(const ErrorCode& error) {
  if (state_ == State::kClosed) return;
  if (error) return RefuseRequest(error);
  read_timer_.cancel();
  state_ = State::kHandling;
  const std::uint64_t id = ++exchange_id_;
  http::request<http::string_body> message = parser_->release();
  parser_.reset();
  head_only_ = message.method() == http::verb::head;
  chunked_ = message.version() >= 11;
  keep_alive_ = message.keep_alive() && !owner_.stopping();
  if (buffer_.size() == 0) ReadSome();  // a pipelined request hides a close until it is its turn
  HttpRequest request = *ToRequest(std::move(message), peer_);  // its path has been screened
  request.client = screening_.client;
  owner_.Dispatch(std::make_shared<Exchange>(weak_from_this(), id, std::move(request)));
}

template <typename F>
void HttpSession::Post(std::uint64_t exchange_id, F f) {
  asio::post(stream_.get_executor(), [self = shared_from_this(), exchange_id, f = std::move(f)]() mutable {
    if (self->exchange_id_ == exchange_id) f(*self);
  });
}

void HttpSession::PostRespond(std::uint64_t exchange_id, HttpResponse response) {
  Post(exchange_id, [response = std::move(response)](HttpSession& self) mutable {
    if (self.state_ == State::kHandling) self.Respond(std::move(response));
  });
}

void HttpSession::PostStartStream(std::uint64_t exchange_id, HttpResponse head) {
  Post(exchange_id, [head = std::move(head)](HttpSession& self) {
    if (self.state_ != State::kHandling) return;
    self.state_ = State::kStreaming;
    if (!self.chunked_) self.keep_alive_ = false;  // HTTP/1.0: the end of the connection ends the body
    self.out_waiting_ += self.Head(head, std::nullopt);
    self.Flush();
  });
}

void HttpSession::PostWrite(std::uint64_t exchange_id, std::string bytes) {
  Post(exchange_id, [bytes = std::move(bytes)](HttpSession& self) {
    if (self.state_ != State::kStreaming || bytes.empty() || self.head_only_) return;
    // The largest piece says nothing of the client: one event alone (a long prompt's echo) may be above the limit.
    const std::size_t behind = self.out_waiting_.size() - self.largest_waiting_;
    if (behind > static_cast<std::size_t>(self.limits_.queued_bytes_max)) return self.Gone();
    const std::string piece = self.chunked_ ? ChunkFrame(bytes) : bytes;
    self.largest_waiting_ = std::max(self.largest_waiting_, piece.size());
    self.out_waiting_ += piece;
    self.Flush();
  });
}

void HttpSession::PostEnd(std::uint64_t exchange_id, bool whole) {
  Post(exchange_id, [whole](HttpSession& self) {
    if (self.state_ != State::kStreaming) return;
    self.state_ = State::kEnding;
    if (!whole) self.keep_alive_ = false;
    if (whole && self.chunked_ && !self.head_only_) self.out_waiting_ += "0\r\n\r\n";
    self.Flush();
  });
}

void HttpSession::PostOnGone(std::uint64_t exchange_id, std::function<void()> gone) {
  asio::post(stream_.get_executor(), [self = shared_from_this(), exchange_id, gone = std::move(gone)]() mutable {
    if (self->state_ == State::kClosed) return gone();
    const bool running = self->state_ == State::kHandling || self->state_ == State::kStreaming;
    if (self->exchange_id_ == exchange_id && running) self->on_gone_ = std::move(gone);
  });
}

void HttpSession::PostTask(std::function<void()> task) {
  asio::post(stream_.get_executor(), [self = shared_from_this(), task = std::move(task)] {
    if (self->state_ != State::kClosed) task();
  });
}

void HttpSession::PostDropped(std::uint64_t exchange_id) {
  Post(exchange_id, [](HttpSession& self) {
    if (self.state_ != State::kHandling && self.state_ != State::kStreaming) return;  // it was answered
    self.keep_alive_ = false;
    if (self.state_ == State::kHandling) return self.Respond(self.owner_.FormatError(500, "the request was dropped"));
    self.state_ = State::kEnding;
    self.Flush();
  });
}

std::string HttpSession::Head(const HttpResponse& response, std::optional<std::size_t> content_length) const {
  const auto reason = http::obsolete_reason(static_cast<http::status>(response.status));
  std::string head = "HTTP/1.1 " + std::to_string(response.status) + " " + std::string(reason) + "\r\n";
  head += "Content-Type: " + response.content_type + "\r\n";
  for (const auto& [name, value] : response.headers) {
    // A line break in a value would let whoever supplied it write headers of their own.
    if (value.find_first_of("\r\n") == std::string::npos) head += name + ": " + value + "\r\n";
  }
  if (content_length.has_value()) {
    head += "Content-Length: " + std::to_string(*content_length) + "\r\n";
  } else if (chunked_) {
    head += "Transfer-Encoding: chunked\r\n";
  }
  head += keep_alive_ ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
  return head;
}

void HttpSession::Respond(HttpResponse response) {
  state_ = State::kEnding;
  out_waiting_ += Head(response, response.body.size());
  if (!head_only_) out_waiting_ += response.body;
  Flush();
}

void HttpSession::Flush() {
  if (!out_writing_.empty() || state_ == State::kClosed) return;
  if (out_waiting_.empty()) {
    if (state_ == State::kEnding) EndExchange();
    return;
  }
  out_writing_.swap(out_waiting_);
  largest_waiting_ = 0;
  n_written_ = 0;
  WriteSome();
}

// As much as the client takes now: the time limit is for one that takes nothing.
void HttpSession::WriteSome() {
  Arm(write_timer_, limits_.write_timeout_ms);
  stream_.async_write_some(
      asio::buffer(out_writing_) + n_written_,
      [self = shared_from_this()](const ErrorCode& error, std::size_t n_bytes) { self->OnWritten(error, n_bytes); });
}

void HttpSession::OnWritten(const ErrorCode& error, std::size_t n_bytes) {
  if (state_ == State::kClosed) return;
  if (error) return Gone();
  n_written_ += n_bytes;
  if (n_written_ < out_writing_.size()) return WriteSome();
  write_timer_.cancel();
  out_writing_.clear();
  Flush();
}

void HttpSession::EndExchange() {
  on_gone_ = nullptr;
  screening_ = {};
  if (!keep_alive_ || owner_.stopping()) return Linger();
  state_ = State::kIdle;
  if (buffer_.size() > 0) return ReadRequest();
  Arm(read_timer_, limits_.idle_timeout_ms);
  ReadSome();
}

// Closing with unread input would reset the connection and could destroy the answer on its way.
void HttpSession::Linger() {
  state_ = State::kLingering;
  Arm(read_timer_, kLingerMs);
  stream_.async_end([self = shared_from_this()] { self->Drain(); });
}

// Reads below TLS: what comes now is for nobody.
void HttpSession::Drain() {
  if (state_ == State::kClosed) return;
  stream_.socket().async_read_some(asio::buffer(thrown_away_),
                                   [self = shared_from_this()](const ErrorCode& error, std::size_t) {
                                     if (error) return self->Gone();
                                     self->Drain();
                                   });
}

void HttpSession::Gone() {
  if (state_ == State::kClosed) return;
  const std::function<void()> gone = std::exchange(on_gone_, nullptr);
  Close();
  if (gone) gone();
}

void HttpSession::Close() {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  on_gone_ = nullptr;
  screening_ = {};
  read_timer_.cancel();
  write_timer_.cancel();
  ErrorCode ignored;
  stream_.socket().close(ignored);
  owner_.Forget(this);
}

}  // namespace zeroc::internal
