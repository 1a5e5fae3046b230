// A small HTTP/1.1 server for the services' edges: /metrics, /healthz, /readyz and the router's API with its streams.
//
// Bounded everywhere: header and body bytes, connections, time to send a request, time a client may take to read, and
// bytes that wait for a slow client. Handlers run on the server's threads and must not block; they may answer later
// from any thread through the exchange. Malformed, oversized or slow requests never reach a handler.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

struct HttpLimits {
  std::int64_t header_bytes_max = 16 << 10;
  std::int64_t body_bytes_max = 16 << 20;
  std::int64_t connections_max = 1024;
  std::int64_t request_timeout_ms = 10'000;  // first byte of the header to the last byte of the body
  std::int64_t idle_timeout_ms = 60'000;     // between requests of one connection
  std::int64_t write_timeout_ms = 30'000;    // a client that reads nothing for this long is gone
  // A stream is ended when more than this waits behind what is being written, its largest piece left out.
  std::int64_t queued_bytes_max = 1 << 20;
  std::int64_t threads = 2;
};

// Files in PEM form. Empty certificate: plain HTTP. With client_ca_file only clients with a certificate that it signed
// are let in (mTLS). TLS 1.2 or later.
struct HttpTls {
  std::string certificate_file;  // the chain, the server's own first
  std::string key_file;
  std::string client_ca_file;
};

struct HttpRequest {
  std::string method;  // "GET"
  std::string path;    // without the query, %XX decoded
  std::string query;
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;
  std::string peer;    // "127.0.0.1:54321"
  std::string client;  // as the screener named it

  // The first header of that name, compared without case; empty when there is none.
  std::string_view Header(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

// One request and its answer: either Respond once, or StartStream, Write.., then Finish or Abort. Any thread, in this
// order; calls after the end are ignored. An exchange that is dropped without an answer answers 500 by itself.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;

  virtual const HttpRequest& request() const = 0;
  virtual void Respond(HttpResponse response) = 0;

  // Chunked; `head.body` is ignored.
  virtual void StartStream(HttpResponse head) = 0;
  virtual void Write(std::string bytes) = 0;
  virtual void Finish() = 0;  // ends the body and keeps the connection
  // After what is queued, closes the connection without the last chunk: the client can tell that the stream is not
  // whole.
  virtual void Abort() = 0;

  // `gone` runs once, on a server thread, when the client has closed or is too slow before the answer was complete.
  // If that has happened already it runs soon.
  virtual void OnClientGone(std::function<void()> gone) = 0;

  // Runs `task` soon on a server thread, for work that may not be done where the caller is. Dropped when the
  // connection is gone.
  virtual void Post(std::function<void()> task) = 0;
};

using HttpHandler = std::function<void(std::shared_ptr<HttpExchange>)>;

class HttpServer {
 public:
  // kUnavailable naming the address when it cannot be bound. Routes are fixed from here on: `method path` exactly, HEAD
  // is answered like GET without the body; another method on a known path is 405, another path 404.
  struct Route {
    std::string method;
    std::string path;
    HttpHandler handler;
  };
  // What an error without a handler looks like (404, 405, 413, ..); null: plain text.
  using ErrorFormatter = std::function<HttpResponse(int status, std::string_view message)>;
  // Looks at a request before its body is read, whatever its path.
  struct Screening {
    std::optional<HttpResponse> refusal;
    std::string client;                // whose request it is
    std::shared_ptr<const void> pass;  // let go when the request has been answered or its client has gone
  };
  using Screener = std::function<Screening(const HttpRequest& head)>;  // null: everything may pass

  // kInvalidArgument naming the file for TLS files that cannot be used.
  static Result<std::unique_ptr<HttpServer>> Start(const std::string& address, const HttpLimits& limits,
                                                   std::vector<Route> routes, ErrorFormatter format_error = nullptr,
                                                   Screener screen = nullptr, const HttpTls& tls = {});
  ~HttpServer();

  int port() const;
  // Closes the listener and idle connections; exchanges go on until they end, and their connections with them.
  void StopAccepting();
  // After StopAccepting: until every client has its answer. False when connections are left at `until`.
  bool WaitClosed(std::chrono::steady_clock::time_point until);
  std::size_t connections() const;

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class Metrics;

// GET /healthz (200 while the process answers), /readyz (200, or 503 with the reason of `ready`), /metrics.
std::vector<HttpServer::Route> StandardRoutes(const Metrics& metrics, std::function<Status()> ready);

}  // namespace zeroc
