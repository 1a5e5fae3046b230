#include "services/common/http_server.h"

#include <algorithm>
#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/beast/core/string.hpp>
#include <chrono>
#include <optional>
#include <thread>
#include <unordered_map>

#include "libzeroc/base/mutex.h"
#include "services/common/http_session.h"
#include "services/common/logging.h"
#include "services/common/metrics.h"
#include "services/common/options.h"

namespace zeroc {

std::string_view HttpRequest::Header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (boost::beast::iequals({key.data(), key.size()}, {name.data(), name.size()})) return value;
  }
  return {};
}

// Accepts and owns the sessions; they outlive no thread of the server.
struct HttpServer::Impl : internal::HttpSessionOwner {
  Impl(const HttpLimits& the_limits, std::vector<Route> the_routes, ErrorFormatter the_format, Screener the_screen)
      : limits(the_limits),
        routes(std::move(the_routes)),
        format(std::move(the_format)),
        screen(std::move(the_screen)) {}

  ~Impl() override {
    StopListening(&internal::HttpSession::CloseSoon);
    work.reset();
    for (std::thread& thread : threads) thread.join();
    io->restart();
    io->poll();
  }

  Status Listen(const std::string& address);
  // In the acceptor's strand: no connection comes behind those that are told.
  void StopListening(void (internal::HttpSession::*tell)()) {
    asio::post(acceptor.get_executor(), [this, tell] {
      boost::system::error_code ignored;
      acceptor.close(ignored);
      retry.cancel();
      for (const auto& session : Sessions()) ((*session).*tell)();
    });
  }
  Status SetUpTls(const HttpTls& files);
  void Accept();
  void OnAccept(const boost::system::error_code& error, tcp::socket socket);

  // internal::HttpSessionOwner
  void Dispatch(std::shared_ptr<HttpExchange> exchange) override;
  Screening Screen(const HttpRequest& head) override { return screen ? screen(head) : Screening(); }
  HttpResponse FormatError(int status, std::string_view message) override {
    if (format) return format(status, message);
    return {status, "text/plain", std::string(message) + "\n", {}};
  }
  void Forget(internal::HttpSession* session) override {
    MutexLock lock(mu);
    sessions.erase(session);
    if (sessions.empty()) all_closed.NotifyAll();
  }
  bool stopping() const override { return is_stopping.load(); }

  std::vector<std::shared_ptr<internal::HttpSession>> Sessions() {
    MutexLock lock(mu);
    std::vector<std::shared_ptr<internal::HttpSession>> result;
    for (const auto& entry : sessions) result.push_back(entry.second);
    return result;
  }

  const HttpLimits limits;
  const std::vector<Route> routes;
  const ErrorFormatter format;
  const Screener screen;
  std::optional<asio::ssl::context> tls;
  std::shared_ptr<asio::io_context> io = std::make_shared<asio::io_context>();
  asio::executor_work_guard<asio::io_context::executor_type> work{io->get_executor()};
  tcp::acceptor acceptor{asio::make_strand(*io)};
  asio::steady_timer retry{*io};
  std::atomic<bool> is_stopping{false};
  Mutex mu;
  CondVar all_closed;
  std::unordered_map<internal::HttpSession*, std::shared_ptr<internal::HttpSession>> sessions ZEROC_GUARDED_BY(mu);
  std::vector<std::thread> threads;
};

Status HttpServer::Impl::Listen(const std::string& address) {
  Result<HostPort> parsed = ParseHostPort(address);
  if (!parsed.ok()) return parsed.status();
  boost::system::error_code error;
  const auto fail = [&] { return Unavailable("HTTP cannot listen on " + address + ": " + error.message()); };
  tcp::resolver resolver(*io);
  const auto found = resolver.resolve(parsed->host, std::to_string(parsed->port),
                                      tcp::resolver::passive | tcp::resolver::numeric_service, error);
  if (error || found.empty()) return fail();
  const tcp::endpoint endpoint = found.begin()->endpoint();
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(asio::socket_base::reuse_address(true), error);  // only past TIME_WAIT on Linux
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (error) return fail();
  return OkStatus();
}

Status HttpServer::Impl::SetUpTls(const HttpTls& files) {
  if (files.certificate_file.empty()) {
    if (files.key_file.empty() && files.client_ca_file.empty()) return OkStatus();
    return InvalidArgument("TLS: a key or a client CA without a certificate");
  }
  tls.emplace(asio::ssl::context::tls_server);
  boost::system::error_code error;
  const auto fail = [&](const std::string& file) { return InvalidArgument("TLS: " + file + ": " + error.message()); };
  tls->set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_tlsv1 |
                       asio::ssl::context::no_tlsv1_1 | asio::ssl::context::no_compression,
                   error);
  if (error) return fail("options");
  tls->use_certificate_chain_file(files.certificate_file, error);
  if (error) return fail(files.certificate_file);
  tls->use_private_key_file(files.key_file, asio::ssl::context::pem, error);
  if (error) return fail(files.key_file);
  if (files.client_ca_file.empty()) return OkStatus();
  tls->load_verify_file(files.client_ca_file, error);
  if (!error) tls->set_verify_mode(asio::ssl::verify_peer | asio::ssl::verify_fail_if_no_peer_cert, error);
  if (error) return fail(files.client_ca_file);
  return OkStatus();
}

void HttpServer::Impl::Accept() {
  acceptor.async_accept(asio::make_strand(*io), [this](const boost::system::error_code& error, tcp::socket socket) {
    OnAccept(error, std::move(socket));
  });
}

void HttpServer::Impl::OnAccept(const boost::system::error_code& error, tcp::socket socket) {
  if (!acceptor.is_open()) return;
  if (error) {  // out of descriptors, or the peer was gone at once: neither may stop the server nor spin
    retry.expires_after(std::chrono::milliseconds(50));
    retry.async_wait([this](const boost::system::error_code& cancelled) {
      if (!cancelled) asio::post(acceptor.get_executor(), [this] { Accept(); });
    });
    return;
  }
  bool full = false;
  std::shared_ptr<internal::HttpSession> session;
  {
    MutexLock lock(mu);
    full = static_cast<std::int64_t>(sessions.size()) >= limits.connections_max;
    if (!full) {
      session = std::make_shared<internal::HttpSession>(io, std::move(socket), tls.has_value() ? &*tls : nullptr,
                                                        limits, *this);
      sessions.emplace(session.get(), session);
    }
  }
  if (full) {
    static constexpr std::string_view kFull =
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    boost::system::error_code ignored;
    socket.non_blocking(true, ignored);
    socket.write_some(asio::buffer(kFull.data(), kFull.size()), ignored);
  } else {
    session->Start();
  }
  Accept();
}

void HttpServer::Impl::Dispatch(std::shared_ptr<HttpExchange> exchange) {
  const HttpRequest& request = exchange->request();
  bool path_known = false;
  for (const Route& route : routes) {
    if (route.path != request.path) continue;
    path_known = true;
    if (route.method == request.method || (route.method == "GET" && request.method == "HEAD")) {
      route.handler(std::move(exchange));
      return;
    }
  }
  const int status = path_known ? 405 : 404;
  exchange->Respond(FormatError(status, request.method + " " + request.path + " is not served here"));
}

Result<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& address, const HttpLimits& limits,
                                                      std::vector<Route> routes, ErrorFormatter format_error,
                                                      Screener screen, const HttpTls& tls) {
  auto impl = std::make_unique<Impl>(limits, std::move(routes), std::move(format_error), std::move(screen));
  ZEROC_RETURN_IF_ERROR(impl->SetUpTls(tls));
  ZEROC_RETURN_IF_ERROR(impl->Listen(address));
  Impl* raw = impl.get();
  asio::post(raw->acceptor.get_executor(), [raw] { raw->Accept(); });
  for (std::int64_t i = 0; i < limits.threads; ++i) raw->threads.emplace_back([raw] { raw->io->run(); });
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->acceptor.local_endpoint().port(); }

void HttpServer::StopAccepting() {
  impl_->is_stopping.store(true);
  impl_->StopListening(&internal::HttpSession::CloseIfIdleSoon);
}

bool HttpServer::WaitClosed(std::chrono::steady_clock::time_point until) {
  MutexLock lock(impl_->mu);
  while (!impl_->sessions.empty()) {
    if (!impl_->all_closed.WaitUntil(impl_->mu, until)) return impl_->sessions.empty();
  }
  return true;
}

std::size_t HttpServer::connections() const {
  MutexLock lock(impl_->mu);
  return impl_->sessions.size();
}

std::vector<HttpServer::Route> StandardRoutes(const Metrics& metrics, std::function<Status()> ready) {
  const auto answer = [](int status, std::string body) {
    return HttpResponse{status, "text/plain; charset=utf-8", std::move(body), {}};
  };
  return {
      {"GET", "/healthz", [answer](auto exchange) { exchange->Respond(answer(200, "ok\n")); }},
      {"GET", "/readyz",
       [answer, ready = std::move(ready)](auto exchange) {
         const Status status = ready();
         exchange->Respond(status.ok() ? answer(200, "ready\n") : answer(503, std::string(status.message()) + "\n"));
       }},
      {"GET", "/metrics",
       [&metrics](auto exchange) {
         exchange->Respond({200, "text/plain; version=0.0.4; charset=utf-8", metrics.Render(), {}});
       }},
  };
}

}  // namespace zeroc
