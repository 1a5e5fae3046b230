#include "services/common/security.h"

#include <grpcpp/grpcpp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>

#include <algorithm>
#include <fstream>
#include <string_view>
#include <utility>

#include "services/common/access.h"

namespace zeroc {
namespace {

constexpr std::size_t kFileBytesMax = 1 << 20;
constexpr char kClusterKeyHeader[] = "x-zeroc-cluster-key";

Result<std::string> ReadSmallFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound(path + ": cannot be opened");
  std::string text(kFileBytesMax + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) return InvalidArgument(path + ": larger than 1 MiB");
  return text;
}

Result<std::string> ReadOptional(const std::string& path) {
  if (path.empty()) return std::string();
  return ReadSmallFile(path);
}

// Why OpenSSL refused; takes its errors, so that none is left for the next call of this thread.
Status Refused(const std::string& file) {
  const char* reason = ERR_reason_error_string(ERR_peek_error());
  Status status = InvalidArgument("TLS: " + file + ": " + (reason != nullptr ? reason : "cannot be used"));
  ERR_clear_error();
  return status;
}

// Loads everything once only to find what is wrong with it: gRPC says no more than that a server does not start.
Status CheckFiles(const SecurityOptions& options) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_method()), SSL_CTX_free);
  if (context == nullptr) return Internal("TLS: OpenSSL gives no context");
  ERR_clear_error();
  if (!options.tls_certificate_file.empty()) {
    if (SSL_CTX_use_certificate_chain_file(context.get(), options.tls_certificate_file.c_str()) != 1) {
      return Refused(options.tls_certificate_file);
    }
    const char* key = options.tls_key_file.c_str();
    // Fails too when the key is not the certificate's.
    if (SSL_CTX_use_PrivateKey_file(context.get(), key, SSL_FILETYPE_PEM) != 1) return Refused(options.tls_key_file);
  }
  for (const std::string& ca : {options.tls_ca_file, options.grpc_client_ca_file, options.http_client_ca_file}) {
    if (!ca.empty() && SSL_CTX_load_verify_locations(context.get(), ca.c_str(), nullptr) != 1) return Refused(ca);
  }
  return OkStatus();
}

Status CheckCombination(const SecurityOptions& options) {
  if (options.tls_certificate_file.empty() != options.tls_key_file.empty()) {
    return InvalidArgument("tls_certificate_file and tls_key_file belong together");
  }
  const bool asks_clients = !options.grpc_client_ca_file.empty() || !options.http_client_ca_file.empty();
  if (options.tls_certificate_file.empty() && asks_clients) {
    return InvalidArgument("grpc_client_ca_file and http_client_ca_file need tls_certificate_file");
  }
  const bool both = !options.tls_certificate_file.empty() && !options.tls_ca_file.empty();
  if (!options.cluster_key_file.empty() && !both) {
    return InvalidArgument(
        "cluster_key_file needs tls_certificate_file and tls_ca_file: it does not travel in the clear");
  }
  return OkStatus();
}

// Services between router and workers; the rest is open to clients, whom the router asks for API keys itself.
bool IsInternal(std::string_view path) {
  static constexpr std::string_view kServices[] = {"/zeroc.v1.Registry/", "/zeroc.v1.Decode/", "/zeroc.v1.Prefill/"};
  return std::any_of(std::begin(kServices), std::end(kServices),
                     [path](std::string_view service) { return path.starts_with(service); });
}

class ClusterKeyCheck : public grpc::AuthMetadataProcessor {
 public:
  explicit ClusterKeyCheck(std::string key) : key_(std::move(key)) {}
  bool IsBlocking() const override { return false; }
  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext*, OutputMetadata* consumed,
                       OutputMetadata*) override {
    const auto path = metadata.find(":path");
    const auto given = metadata.find(kClusterKeyHeader);
    if (given != metadata.end()) consumed->emplace(kClusterKeyHeader, ToString(given->second));
    // A call without a path is none that gRPC makes; it is not let through for that.
    if (path != metadata.end() && !IsInternal(ToString(path->second))) return grpc::Status::OK;
    if (given != metadata.end() && SameSecret(ToString(given->second), key_)) return grpc::Status::OK;
    return {grpc::StatusCode::UNAUTHENTICATED,
            given == metadata.end() ? "the cluster's key is missing" : "this is not the cluster's key"};
  }

 private:
  static std::string ToString(grpc::string_ref text) { return {text.data(), text.size()}; }
  const std::string key_;
};

class ClusterKeyPlugin : public grpc::MetadataCredentialsPlugin {
 public:
  explicit ClusterKeyPlugin(std::string key) : key_(std::move(key)) {}
  bool IsBlocking() const override { return false; }
  grpc::Status GetMetadata(grpc::string_ref, grpc::string_ref, const grpc::AuthContext&,
                           std::multimap<grpc::string, grpc::string>* metadata) override {
    metadata->emplace(kClusterKeyHeader, key_);
    return grpc::Status::OK;
  }
  grpc::string DebugString() override { return "cluster key"; }

 private:
  const std::string key_;
};

}  // namespace

void AddSecurityOptions(OptionSet* set, SecurityOptions* o) {
  set->AddString("tls_certificate_file", &o->tls_certificate_file,
                 {"PEM", "Our chain, own certificate first; HTTP and gRPC are then served by TLS. Empty: plain."});
  set->AddString("tls_key_file", &o->tls_key_file, {"PEM", "Private key of the certificate."});
  set->AddString("tls_ca_file", &o->tls_ca_file,
                 {"PEM", "Router and workers connect to each other by TLS, and these sign the servers. Empty: plain."});
  set->AddString(
      "grpc_client_ca_file", &o->grpc_client_ca_file,
      {"PEM", "Only gRPC clients with a certificate that these sign are let in. Empty: no certificate asked."});
  set->AddString(
      "http_client_ca_file", &o->http_client_ca_file,
      {"PEM", "Only HTTP clients with a certificate that these sign are let in. Empty: no certificate asked."});
  set->AddString("cluster_key_file", &o->cluster_key_file,
                 {"", "A secret that router and workers show each other, beside TLS. Empty: none."});
}

Result<std::string> ReadSecretFile(const std::string& path) {
  std::string text;
  ZEROC_ASSIGN_OR_RETURN(text, ReadSmallFile(path));
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
  if (!IsGoodSecret(text)) return InvalidArgument(path + ": is not one line of 16 to 256 printable characters");
  return text;
}

Result<Security> LoadSecurity(const SecurityOptions& options) {
  ZEROC_RETURN_IF_ERROR(CheckCombination(options));
  Security security;
  GrpcSecurity& grpc = security.grpc;
  ZEROC_ASSIGN_OR_RETURN(grpc.certificate, ReadOptional(options.tls_certificate_file));
  ZEROC_ASSIGN_OR_RETURN(grpc.key, ReadOptional(options.tls_key_file));
  ZEROC_ASSIGN_OR_RETURN(grpc.ca, ReadOptional(options.tls_ca_file));
  ZEROC_ASSIGN_OR_RETURN(grpc.client_ca, ReadOptional(options.grpc_client_ca_file));
  ZEROC_RETURN_IF_ERROR(ReadOptional(options.http_client_ca_file).status());
  if (!options.cluster_key_file.empty()) {
    ZEROC_ASSIGN_OR_RETURN(grpc.cluster_key, ReadSecretFile(options.cluster_key_file));
  }
  ZEROC_RETURN_IF_ERROR(CheckFiles(options));
  security.http = {options.tls_certificate_file, options.tls_key_file, options.http_client_ca_file};
  return security;
}

std::string Security::Describe() const {
  const auto server = [this](bool asks) { return grpc.certificate.empty() ? "plain" : asks ? "mtls" : "tls"; };
  return std::string("http=") + server(!http.client_ca_file.empty()) + " grpc=" + server(!grpc.client_ca.empty()) +
         " peers=" + (grpc.ca.empty() ? "plain" : "tls") + " cluster_key=" + (grpc.cluster_key.empty() ? "no" : "yes");
}

std::shared_ptr<grpc::ServerCredentials> GrpcSecurity::MakeServerCredentials() const {
  if (certificate.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(client_ca.empty()
                                                ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = client_ca;
  options.pem_key_cert_pairs.push_back({key, certificate});
  auto credentials = grpc::SslServerCredentials(options);
  if (!cluster_key.empty()) {
    credentials->SetAuthMetadataProcessor(std::make_shared<ClusterKeyCheck>(cluster_key));
  }
  return credentials;
}

std::shared_ptr<grpc::ChannelCredentials> GrpcSecurity::MakeChannelCredentials() const {
  if (ca.empty()) return grpc::InsecureChannelCredentials();
  auto credentials = grpc::SslCredentials({ca, key, certificate});
  if (cluster_key.empty()) return credentials;
  return grpc::CompositeChannelCredentials(
      credentials, grpc::MetadataCredentialsFromPlugin(std::make_unique<ClusterKeyPlugin>(cluster_key)));
}

}  // namespace zeroc
