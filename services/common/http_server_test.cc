#include "services/common/http_server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "services/common/metrics.h"
#include "services/common/test_http_client.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

template <typename Condition>
bool WaitFor(Condition condition, milliseconds limit = milliseconds(5000)) {
  const auto end = steady_clock::now() + limit;
  while (!condition()) {
    if (steady_clock::now() > end) return false;
    std::this_thread::sleep_for(milliseconds(2));
  }
  return true;
}

class HttpServerTest : public testing::Test {
 protected:
  void Start(HttpLimits limits = {}) {
    auto routes = StandardRoutes(metrics_, [] { return Unavailable("no workers"); });
    routes.push_back({"POST", "/echo", [](auto exchange) {
                        exchange->Respond({200, "text/plain", exchange->request().body, {}});
                      }});
    routes.push_back({"GET", "/hold", [this](auto exchange) {
                        exchange->OnClientGone([this] { ++gone_; });
                        MutexLock lock(mu_);
                        held_ = std::move(exchange);
                      }});
    routes.push_back({"GET", "/drop", [](auto) {}});
    routes.push_back({"GET", "/inject", [](auto exchange) {
                        exchange->Respond({200, "text/plain", "", {{"X-Good", "1"}, {"X-Bad", "1\r\nX-Evil: 1"}}});
                      }});
    Result<std::unique_ptr<HttpServer>> server = HttpServer::Start("127.0.0.1:0", limits, std::move(routes));
    ASSERT_TRUE(server.ok()) << server.status().ToString();
    server_ = std::move(*server);
  }
  std::shared_ptr<HttpExchange> Held() {
    std::shared_ptr<HttpExchange> exchange;
    WaitFor([&] {
      MutexLock lock(mu_);
      exchange = std::exchange(held_, nullptr);
      return exchange != nullptr;
    });
    return exchange;
  }
  int port() const { return server_->port(); }

  Metrics metrics_{"test"};
  Mutex mu_;
  std::shared_ptr<HttpExchange> held_;
  std::atomic<int> gone_{0};
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, KeepsAConnectionForManyRequestsAndPipelines) {
  Start();
  TestHttpClient client(port());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.Post("/echo", "body " + std::to_string(i)));
    const std::string response = client.ReadResponse();
    EXPECT_TRUE(response.starts_with("HTTP/1.1 200 OK\r\n")) << response;
    EXPECT_TRUE(response.ends_with("\r\n\r\nbody " + std::to_string(i))) << response;
  }
  ASSERT_TRUE(
      client.Send("GET /healthz HTTP/1.1\r\nHost: t\r\n\r\nPOST /echo HTTP/1.1\r\nHost: t\r\n"
                  "Content-Length: 3\r\n\r\nabc"));
  EXPECT_TRUE(client.ReadResponse().ends_with("\r\n\r\nok\n"));
  EXPECT_TRUE(client.ReadResponse().ends_with("\r\n\r\nabc"));
}

TEST_F(HttpServerTest, StandardRoutesSayReadinessAndMetrics) {
  Start();
  metrics_.CountSuccess("stop");
  TestHttpClient client(port());
  client.Get("/readyz");
  EXPECT_TRUE(client.ReadResponse().starts_with("HTTP/1.1 503 "));
  client.Get("/metrics");
  EXPECT_NE(client.ReadResponse().find("vllm:request_success_total{model_name=\"test\",finished_reason=\"stop\"} 1"),
            std::string::npos);
  client.Send("HEAD /healthz HTTP/1.1\r\nHost: t\r\n\r\n");
  const std::string head = client.ReadUntil("\r\n\r\n");
  EXPECT_NE(head.find("Content-Length: 3\r\n"), std::string::npos);
  EXPECT_TRUE(head.ends_with("\r\n\r\n")) << "HEAD has no body: " << head;
}

TEST_F(HttpServerTest, RefusesWhatItDoesNotServe) {
  Start();
  const auto status_of = [this](const std::string& bytes) {
    TestHttpClient client(port());
    client.Send(bytes);
    return client.ReadResponse().substr(0, 12);
  };
  EXPECT_EQ(status_of("GET /nothing HTTP/1.1\r\nHost: t\r\n\r\n"), "HTTP/1.1 404");
  EXPECT_EQ(status_of("GET /echo HTTP/1.1\r\nHost: t\r\n\r\n"), "HTTP/1.1 405");
  EXPECT_EQ(status_of("nonsense\r\n\r\n"), "HTTP/1.1 400");
  EXPECT_EQ(status_of("GET / HTTP/9.9\r\n\r\n"), "HTTP/1.1 400");
  EXPECT_EQ(status_of("POST /echo HTTP/1.1\r\nContent-Length: -5\r\n\r\n"), "HTTP/1.1 400");
  EXPECT_EQ(status_of("POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "HTTP/1.1 400");
  EXPECT_EQ(status_of("GET /drop HTTP/1.1\r\nHost: t\r\n\r\n"), "HTTP/1.1 500") << "a dropped exchange answers itself";
}

TEST_F(HttpServerTest, DecodesThePath) {
  Start();
  const auto status_of = [this](const std::string& target) {
    TestHttpClient client(port());
    client.Get(target);
    return client.ReadResponse().substr(0, 12);
  };
  EXPECT_EQ(status_of("/%68ealth%7A?x=%zz"), "HTTP/1.1 200") << "the query stays as it is";
  EXPECT_EQ(status_of("/health%257a"), "HTTP/1.1 404") << "once";
  for (const char* target : {"/%", "/healthz%6", "/%zz", "/%6g", "/%-1"}) {
    EXPECT_EQ(status_of(target), "HTTP/1.1 400") << target;
  }
}

TEST_F(HttpServerTest, BoundsHeadersAndBodies) {
  HttpLimits limits;
  limits.header_bytes_max = 2048;
  limits.body_bytes_max = 1000;
  Start(limits);
  TestHttpClient huge_header(port());
  huge_header.Send("GET /healthz HTTP/1.1\r\nX-Long: " + std::string(100'000, 'a'));
  EXPECT_TRUE(huge_header.ReadAll().starts_with("HTTP/1.1 431 ")) << "without waiting for the header's end";

  TestHttpClient huge_body(port());
  huge_body.Send("POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 1001\r\n\r\n");
  EXPECT_TRUE(huge_body.ReadAll().starts_with("HTTP/1.1 413 ")) << "without waiting for the body";

  TestHttpClient chunked(port());
  chunked.Send("POST /echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 20; ++i) chunked.Send("64\r\n" + std::string(100, 'x') + "\r\n");
  EXPECT_TRUE(chunked.ReadAll().starts_with("HTTP/1.1 413 "));

  TestHttpClient fits(port());
  fits.Post("/echo", std::string(1000, 'y'));
  EXPECT_TRUE(fits.ReadResponse().starts_with("HTTP/1.1 200 "));
}

TEST_F(HttpServerTest, AnswersExpectContinue) {
  Start();
  TestHttpClient client(port());
  client.Send("POST /echo HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
  ASSERT_EQ(client.ReadUntil("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  client.Send("hi");
  EXPECT_NE(client.ReadUntil("\r\n\r\nhi").find("HTTP/1.1 200 OK"), std::string::npos);
}

TEST_F(HttpServerTest, ClosesOnAClientThatSendsTooSlowly) {
  HttpLimits limits;
  limits.request_timeout_ms = 100;
  Start(limits);
  TestHttpClient silent(port());
  TestHttpClient half(port());
  half.Send("POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc");
  silent.ReadAll();
  half.ReadAll();
  EXPECT_TRUE(silent.at_end());
  EXPECT_TRUE(half.at_end());
  EXPECT_TRUE(WaitFor([this] { return server_->connections() == 0; }));
}

TEST_F(HttpServerTest, StreamsInChunksAndEndsThemProperly) {
  Start();
  TestHttpClient client(port());
  client.Get("/hold");
  const auto exchange = Held();
  ASSERT_NE(exchange, nullptr);
  exchange->StartStream({200, "text/event-stream", "", {}});
  exchange->Write("one");
  EXPECT_NE(client.ReadUntil("one").find("Transfer-Encoding: chunked"), std::string::npos);
  exchange->Write("two two two two!");
  exchange->Finish();
  EXPECT_TRUE(client.ReadUntil("0\r\n\r\n").ends_with("3\r\none\r\n10\r\ntwo two two two!\r\n0\r\n\r\n"));
  client.Get("/healthz");
  EXPECT_NE(client.ReadUntil("ok\n").find("HTTP/1.1 200 OK\r\nContent-Type: text/plain"), std::string::npos)
      << "the connection goes on";
  EXPECT_EQ(gone_.load(), 0);
}

TEST_F(HttpServerTest, AbortClosesWithoutTheLastChunk) {
  Start();
  TestHttpClient client(port());
  client.Get("/hold");
  const auto exchange = Held();
  exchange->StartStream({200, "text/event-stream", "", {}});
  exchange->Write("partial");
  exchange->Abort();
  const std::string all = client.ReadAll();
  EXPECT_TRUE(client.at_end());
  EXPECT_TRUE(all.ends_with("7\r\npartial\r\n")) << all;
}

TEST_F(HttpServerTest, AnOldClientGetsAStreamWithoutChunks) {
  Start();
  TestHttpClient client(port());
  client.Send("GET /hold HTTP/1.0\r\n\r\n");
  const auto exchange = Held();
  exchange->StartStream({200, "text/plain", "", {}});
  exchange->Write("raw");
  exchange->Finish();
  const std::string all = client.ReadAll();
  EXPECT_TRUE(all.ends_with("\r\n\r\nraw")) << all;
  EXPECT_TRUE(client.at_end());
}

TEST_F(HttpServerTest, TellsWhenTheClientGoesAway) {
  Start();
  for (const bool streaming : {false, true}) {
    gone_ = 0;
    TestHttpClient client(port());
    client.Get("/hold");
    const auto exchange = Held();
    ASSERT_NE(exchange, nullptr);
    if (streaming) exchange->StartStream({200, "text/plain", "", {}});
    client.Close();
    EXPECT_TRUE(WaitFor([this] { return gone_.load() == 1; })) << "streaming " << streaming;
    exchange->Respond({200, "text/plain", "too late", {}});  // ignored, must not crash
    std::atomic<bool> again{false};
    exchange->OnClientGone([&] { again = true; });
    EXPECT_TRUE(WaitFor([&] { return again.load(); }));
  }
}

TEST_F(HttpServerTest, EndsAStreamWhoseClientIsTooFarBehind) {
  HttpLimits limits;
  limits.queued_bytes_max = 1 << 20;
  Start(limits);
  TestHttpClient client(port(), 4096);
  client.Get("/hold");
  const auto exchange = Held();
  exchange->StartStream({200, "text/plain", "", {}});
  const std::string piece(64 << 10, 'z');
  int sent = 0;
  for (; sent < 2000 && gone_.load() == 0; ++sent) {
    exchange->Write(piece);
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(gone_.load(), 1);
  EXPECT_LT(sent, 2000) << "the queue has a bound";
}

TEST_F(HttpServerTest, AClientThatReadsNothingTimesOut) {
  HttpLimits limits;
  limits.write_timeout_ms = 100;
  limits.queued_bytes_max = 64 << 20;
  Start(limits);
  TestHttpClient client(port(), 4096);
  client.Get("/hold");
  const auto exchange = Held();
  exchange->StartStream({200, "text/plain", "", {}});
  exchange->Write(std::string(32 << 20, 'z'));
  EXPECT_TRUE(WaitFor([this] { return gone_.load() == 1; }));
}

// One event above the limit, such as a long prompt's echo, says nothing of how fast its client reads.
TEST_F(HttpServerTest, AnEventMayBeLargerThanTheQueue) {
  HttpLimits limits;
  limits.queued_bytes_max = 1000;
  Start(limits);
  TestHttpClient client(port());
  client.Get("/hold");
  const auto exchange = Held();
  ASSERT_NE(exchange, nullptr);
  exchange->StartStream({200, "text/plain", "", {}});
  exchange->Write(std::string(4 << 20, 'z'));
  exchange->Write("next");
  exchange->Finish();
  ASSERT_TRUE(client.ReadBytes(4 << 20));
  EXPECT_TRUE(client.ReadUntil("next\r\n0\r\n\r\n").ends_with("z\r\n4\r\nnext\r\n0\r\n\r\n"));
  EXPECT_EQ(gone_.load(), 0);
}

// The time limit is for a client that takes nothing, not for one whose answer takes longer in all. A machine that
// stands still for as long as the limit proves nothing: once more.
TEST_F(HttpServerTest, AClientThatReadsSlowlyGetsAll) {
  HttpLimits limits;
  limits.write_timeout_ms = 1000;
  Start(limits);
  constexpr std::size_t kPiece = 4 << 20;
  const std::string body(10 * kPiece, 'z');  // more than the pieces below and what the kernel holds
  bool whole = false;
  for (int tries = 0; tries < 3 && !whole; ++tries) {
    TestHttpClient client(port());
    client.Get("/hold");
    const auto exchange = Held();
    ASSERT_NE(exchange, nullptr);
    exchange->Respond({200, "text/plain", body, {}});
    for (int i = 0; i < 5 && client.ReadBytes(kPiece); ++i) std::this_thread::sleep_for(milliseconds(250));
    whole = client.ReadResponse().size() > body.size();
  }
  EXPECT_TRUE(whole);
}

TEST_F(HttpServerTest, BoundsConnections) {
  HttpLimits limits;
  limits.connections_max = 2;
  Start(limits);
  TestHttpClient first(port()), second(port());
  first.Get("/healthz");
  second.Get("/healthz");
  first.ReadResponse();
  second.ReadResponse();
  TestHttpClient third(port());
  EXPECT_TRUE(third.ReadAll().starts_with("HTTP/1.1 503 "));
  first.Close();
  EXPECT_TRUE(WaitFor([this] { return server_->connections() == 1; }));
  TestHttpClient fourth(port());
  fourth.Get("/healthz");
  EXPECT_TRUE(fourth.ReadResponse().starts_with("HTTP/1.1 200 "));
}

TEST_F(HttpServerTest, HeaderValuesCannotForgeHeaders) {
  Start();
  TestHttpClient client(port());
  client.Get("/inject");
  const std::string response = client.ReadResponse();
  EXPECT_NE(response.find("X-Good: 1"), std::string::npos);
  EXPECT_EQ(response.find("X-Evil"), std::string::npos);
}

TEST_F(HttpServerTest, APortInUseIsAClearError) {
  Start();
  const std::string address = "127.0.0.1:" + std::to_string(port());
  const auto second = HttpServer::Start(address, {}, {});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), StatusCode::kUnavailable);
  EXPECT_NE(second.status().message().find(address), std::string_view::npos) << second.status().ToString();
}

TEST_F(HttpServerTest, AStoppingServerWritesItsAnswersToTheEnd) {
  Start();
  TestHttpClient idle(port()), reader(port());
  idle.Get("/healthz");
  idle.ReadResponse();
  reader.Get("/hold");
  const auto exchange = Held();
  ASSERT_NE(exchange, nullptr);
  const std::string body(32 << 20, 'z');  // more than the kernel holds
  exchange->Respond({200, "text/plain", body, {}});
  server_->StopAccepting();
  idle.ReadAll();
  EXPECT_TRUE(idle.at_end());
  EXPECT_FALSE(server_->WaitClosed(steady_clock::now() + milliseconds(20))) << "nobody has read the answer";
  std::size_t n_read = 0;
  std::thread reading([&] {
    n_read = reader.ReadResponse().size();
    reader.Close();
  });
  EXPECT_TRUE(server_->WaitClosed(steady_clock::now() + milliseconds(20'000)));
  server_.reset();
  reading.join();
  EXPECT_GT(n_read, body.size());
}

// A connection that was accepted while the server stopped was told nothing, and stayed until its client spoke.
TEST_F(HttpServerTest, StopsWhileClientsConnect) {
  HttpLimits limits;
  limits.request_timeout_ms = 600'000;
  for (int round = 0; round < 20; ++round) {
    Start(limits);
    std::vector<std::unique_ptr<TestHttpClient>> silent;
    std::thread connecting([&silent, port = port()] {
      for (int i = 0; i < 20; ++i) silent.push_back(std::make_unique<TestHttpClient>(port));
    });
    EXPECT_TRUE(WaitFor([this] { return server_->connections() > 0; }));
    server_->StopAccepting();
    connecting.join();
    ASSERT_TRUE(server_->WaitClosed(steady_clock::now() + milliseconds(5000))) << "round " << round;
  }
}

TEST_F(HttpServerTest, StopsWithConnectionsInEveryState) {
  Start();
  TestHttpClient idle(port()), half(port()), held(port());
  idle.Get("/healthz");
  idle.ReadResponse();
  half.Send("POST /echo HTTP/1.1\r\nContent-Le");
  held.Get("/hold");
  const auto exchange = Held();
  ASSERT_NE(exchange, nullptr);
  const auto before = steady_clock::now();
  server_.reset();
  EXPECT_LT(steady_clock::now() - before, milliseconds(2000));
  EXPECT_EQ(gone_.load(), 1);
  exchange->Respond({200, "text/plain", "nobody is there", {}});
}

}  // namespace
}  // namespace zeroc
