// Who may use an API: bearer keys from a file, and how often each of them may ask.
//
// Thread-safe. The file is read again when it changes (looked at once a second at most, when somebody asks); a changed
// file that cannot be read leaves the old keys in force. Keys are compared in constant time and are in no message.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/base/status.h"

namespace zeroc {

struct ApiKey {
  std::string name;  // stands in log lines
  std::string secret;
};

// One key a line: a name, white space, the key of 16 to 256 printable characters. Empty lines and lines that begin with
// '#' are skipped. kInvalidArgument naming `file` and the line, never the key.
Result<std::vector<ApiKey>> ParseApiKeys(std::string_view text, std::string_view file);

// Whether the two are equal, in a time that depends on `given`'s length only.
bool SameSecret(std::string_view given, std::string_view secret);

// 16 to 256 printable characters.
bool IsGoodSecret(std::string_view text);

struct AccessOptions {
  std::string keys_file;           // empty: everybody may ask, as one client called "anyone"
  double requests_per_minute = 0;  // of each client; 0: no limit. Ten seconds' worth may come at once
  std::int64_t in_flight_max = 0;  // requests of each client at a time; 0: no limit
};

class AccessControl {
 public:
  static Result<std::unique_ptr<AccessControl>> Open(const AccessOptions& options);
  ~AccessControl();

  struct Decision {
    Status status;                     // OK, kUnauthenticated, kResourceExhausted
    std::string client;                // the key's name
    int retry_after_s = 0;             // with kResourceExhausted
    std::shared_ptr<const void> pass;  // while it lives, the request is in flight; may outlive this object
  };
  // `authorization` is the header's value, "Bearer KEY"; empty when there is none.
  Decision Admit(std::string_view authorization);

 private:
  struct Impl;
  explicit AccessControl(std::shared_ptr<Impl> impl);
  const std::shared_ptr<Impl> impl_;
};

}  // namespace zeroc
