// Who a service is and whom it believes: TLS certificates and the key of the cluster, with the same settings in every
// service.
//
// The files are read once, at start, and checked there: a message names the file and the reason, never what is in it.
// Renewed certificates take a restart.
#pragma once

#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "services/common/http_server.h"
#include "services/common/options.h"

namespace grpc {
class ChannelCredentials;
class ServerCredentials;
}  // namespace grpc

namespace zeroc {

struct SecurityOptions {
  std::string tls_certificate_file;
  std::string tls_key_file;
  std::string tls_ca_file;
  std::string grpc_client_ca_file;
  std::string http_client_ca_file;
  std::string cluster_key_file;
};

// The set refers to `options`.
void AddSecurityOptions(OptionSet* set, SecurityOptions* options);

// PEM texts and the key, as gRPC wants them. Empty everywhere: plain connections.
struct GrpcSecurity {
  std::string certificate;  // our chain: shown by servers, and by clients where the server asks
  std::string key;
  std::string client_ca;    // not empty: clients without a certificate signed by it are not let in
  std::string ca;           // not empty: we connect by TLS to servers that it signed
  std::string server_name;  // not empty: what the certificate of a server must name, where we connect to a number
  std::string cluster_key;  // not empty: services other than Inference and the standard ones ask for it

  // UNAUTHENTICATED is what a wrong or missing cluster key gets.
  std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials() const;
  std::shared_ptr<grpc::ChannelCredentials> MakeChannelCredentials() const;
};

struct Security {
  GrpcSecurity grpc;
  HttpTls http;
  std::string Describe() const;  // for the start log: "http=tls grpc=mtls peers=tls cluster_key=yes"
};

// kInvalidArgument for settings that make no sense together and for files that do not hold what they should;
// kNotFound for a file that cannot be read.
Result<Security> LoadSecurity(const SecurityOptions& options);

// The secret that a file holds: one line of 16 to 256 printable characters.
Result<std::string> ReadSecretFile(const std::string& path);

}  // namespace zeroc
