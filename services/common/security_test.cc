// Real certificates, made by openssl in a temporary folder: one authority for the cluster, one that nobody believes.
#include "services/common/security.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>

#include "services/common/grpc_server.h"

namespace zeroc {
namespace {

constexpr char kClusterKey[] = "0123456789abcdef-cluster";

class SecurityTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::filesystem::path(testing::TempDir()) / ("security_" + std::to_string(getpid()));
    std::filesystem::create_directories(dir_);
    MakeAuthority("ca");
    MakeAuthority("other");
    MakeCertificate("server", "ca");
    MakeCertificate("stranger", "other");
    std::ofstream(dir_ / "nonsense.pem") << "no certificate\n";
    std::ofstream(dir_ / "cluster.key") << kClusterKey << "\n";
    std::ofstream(dir_ / "short.key") << "short\n";
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(dir_); }

  static void Run(const std::string& arguments) {
    const std::string command = "cd '" + dir_.string() + "' && openssl " + arguments + " >openssl.log 2>&1";
    ASSERT_EQ(std::system(command.c_str()), 0) << command;
  }
  static void MakeAuthority(const std::string& name) {
    Run("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=" + name + " -keyout " + name +
        ".key -out " + name + ".pem");
  }
  static void MakeCertificate(const std::string& name, const std::string& authority) {
    std::ofstream(dir_ / "names") << "subjectAltName=IP:127.0.0.1,DNS:localhost\n";
    Run("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=" + name + " -keyout " + name + ".key -out " +
        name + ".csr");
    Run("x509 -req -days 2 -in " + name + ".csr -CA " + authority + ".pem -CAkey " + authority +
        ".key -CAcreateserial -extfile names -out " + name + ".pem");
  }
  static std::string File(const std::string& name) { return (dir_ / name).string(); }

  static SecurityOptions Options(const std::string& name, const std::string& ca) {
    SecurityOptions options;
    if (!name.empty()) options.tls_certificate_file = File(name + ".pem");
    if (!name.empty()) options.tls_key_file = File(name + ".key");
    if (!ca.empty()) options.tls_ca_file = File(ca + ".pem");
    return options;
  }
  static GrpcSecurity Load(const SecurityOptions& options) {
    const Result<Security> security = LoadSecurity(options);
    EXPECT_TRUE(security.ok()) << security.status().ToString();
    return security.ok() ? security->grpc : GrpcSecurity();
  }
  void Start(const SecurityOptions& options) {
    auto server = GrpcServer::Start("127.0.0.1:0", {}, {}, Load(options));
    ASSERT_TRUE(server.ok()) << server.status().ToString();
    server_ = std::move(*server);
    server_->SetServing(true);
  }
  // The status of one call without a body.
  grpc::StatusCode Call(const SecurityOptions& client, const std::string& method = "/grpc.health.v1.Health/Check",
                        std::size_t metadata_bytes = 0, const std::string& server_name = "") {
    GrpcSecurity security = Load(client);
    security.server_name = server_name;
    grpc::GenericStub stub(MakeGrpcChannel("127.0.0.1:" + std::to_string(server_->port()), {}, security));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    if (metadata_bytes > 0) context.AddMetadata("x-long", std::string(metadata_bytes, 'x'));
    const grpc::ByteBuffer request(nullptr, 0);
    grpc::ByteBuffer response;
    std::promise<grpc::Status> done;
    stub.UnaryCall(&context, method, grpc::StubOptions(), &request, &response,
                   [&](grpc::Status status) { done.set_value(std::move(status)); });
    const grpc::Status status = done.get_future().get();
    EXPECT_EQ(status.error_message().find(kClusterKey), std::string::npos);
    return status.error_code();
  }

  static std::filesystem::path dir_;
  std::unique_ptr<GrpcServer> server_;
};
std::filesystem::path SecurityTest::dir_;

TEST_F(SecurityTest, ATlsServerAnswersWhoBelievesItsAuthority) {
  Start(Options("server", ""));
  EXPECT_EQ(Call(Options("", "ca")), grpc::StatusCode::OK);
  EXPECT_EQ(Call(Options("server", "ca")), grpc::StatusCode::OK) << "a certificate that nobody asks for";
  EXPECT_EQ(Call(Options("", "other")), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Call(Options("", "")), grpc::StatusCode::UNAVAILABLE) << "plain";
}

TEST_F(SecurityTest, AServerBehindANumberIsHeldToItsName) {
  Start(Options("server", ""));
  const std::string health = "/grpc.health.v1.Health/Check";
  EXPECT_EQ(Call(Options("", "ca"), health, 0, "localhost"), grpc::StatusCode::OK);
  EXPECT_EQ(Call(Options("", "ca"), health, 0, "127.0.0.1"), grpc::StatusCode::OK);
  EXPECT_EQ(Call(Options("", "ca"), health, 0, "router.test"), grpc::StatusCode::UNAVAILABLE) << "another's name";
}

TEST_F(SecurityTest, MutualTlsLetsInOnlyWhoIsSigned) {
  SecurityOptions options = Options("server", "");
  options.grpc_client_ca_file = File("ca.pem");
  Start(options);
  EXPECT_EQ(Call(Options("server", "ca")), grpc::StatusCode::OK);
  EXPECT_EQ(Call(Options("", "ca")), grpc::StatusCode::UNAVAILABLE) << "no certificate";
  EXPECT_EQ(Call(Options("stranger", "ca")), grpc::StatusCode::UNAVAILABLE) << "another authority's";
}

TEST_F(SecurityTest, TheClusterKeyGuardsTheServicesBetweenRouterAndWorkers) {
  SecurityOptions server = Options("server", "ca");
  server.cluster_key_file = File("cluster.key");
  Start(server);
  const SecurityOptions client = Options("", "ca");
  SecurityOptions wrong = server;
  wrong.cluster_key_file = File("wrong.key");
  std::ofstream(wrong.cluster_key_file) << kClusterKey << "x";
  EXPECT_EQ(Call(client), grpc::StatusCode::OK) << "health is for everybody";
  for (const char* method : {"/zeroc.v1.Registry/Register", "/zeroc.v1.Decode/Reserve", "/zeroc.v1.Prefill/Run"}) {
    EXPECT_EQ(Call(client, method), grpc::StatusCode::UNAUTHENTICATED) << method;
    EXPECT_EQ(Call(wrong, method), grpc::StatusCode::UNAUTHENTICATED) << method;
    // Nothing is registered here: a call that is let through finds no such method.
    EXPECT_EQ(Call(server, method), grpc::StatusCode::UNIMPLEMENTED) << method;
  }
  EXPECT_EQ(Call(client, "/zeroc.v1.Inference/Generate"), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(SecurityTest, TooMuchMetadataIsRefused) {
  Start({});
  EXPECT_EQ(Call({}, "/grpc.health.v1.Health/Check", 8 << 10), grpc::StatusCode::OK);
  EXPECT_EQ(Call({}, "/grpc.health.v1.Health/Check", 40 << 10), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(SecurityTest, WhatCannotWorkIsRefusedAtTheStartByName) {
  const auto refusal = [](const SecurityOptions& options) {
    const Result<Security> loaded = LoadSecurity(options);
    return loaded.ok() ? std::string("accepted") : std::string(loaded.status().message());
  };
  EXPECT_EQ(refusal(Options("server", "ca")), "accepted");
  EXPECT_EQ(refusal({}), "accepted");
  SecurityOptions options = Options("server", "");
  options.tls_key_file = "";
  EXPECT_NE(refusal(options).find("belong together"), std::string::npos);
  options.tls_key_file = File("stranger.key");
  EXPECT_NE(refusal(options).find("stranger.key: key values mismatch"), std::string::npos) << refusal(options);
  options.tls_key_file = File("no-such.key");
  EXPECT_NE(refusal(options).find("no-such.key: cannot be opened"), std::string::npos);
  options = Options("server", "nonsense");
  EXPECT_NE(refusal(options).find("nonsense.pem"), std::string::npos);
  options = Options("server", "");
  options.tls_certificate_file = File("nonsense.pem");
  EXPECT_NE(refusal(options).find("nonsense.pem"), std::string::npos);
  options = {};
  options.http_client_ca_file = File("ca.pem");
  EXPECT_NE(refusal(options).find("need tls_certificate_file"), std::string::npos);
  options = Options("server", "");
  options.cluster_key_file = File("cluster.key");
  EXPECT_NE(refusal(options).find("cluster_key_file needs"), std::string::npos) << "the key would travel in the clear";
  options = Options("server", "ca");
  options.cluster_key_file = File("short.key");
  EXPECT_NE(refusal(options).find("short.key: is not one line"), std::string::npos);
}

}  // namespace
}  // namespace zeroc
