#include "services/common/access.h"

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>

#include "services/common/logging.h"

namespace zeroc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kFileBytesMax = 1 << 20;
constexpr std::size_t kSecretBytesMin = 16, kSecretBytesMax = 256, kNameBytesMax = 64;
constexpr char kAnyone[] = "anyone";
constexpr double kBurstSeconds = 10;

// What a change of the file changes.
struct FileVersion {
  std::int64_t seconds = 0, nanoseconds = 0;
  std::uint64_t size = 0, inode = 0;
  bool operator==(const FileVersion&) const = default;
};

FileVersion VersionOf(const std::string& path) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) return {};
  return {info.st_mtim.tv_sec, info.st_mtim.tv_nsec, static_cast<std::uint64_t>(info.st_size),
          static_cast<std::uint64_t>(info.st_ino)};
}

Result<std::vector<ApiKey>> ReadKeys(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound(path + ": cannot be opened");
  std::string text(kFileBytesMax + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) return InvalidArgument(path + ": larger than 1 MiB");
  return ParseApiKeys(text, path);
}

bool IsPrintable(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

}  // namespace

bool IsGoodSecret(std::string_view text) {
  return text.size() >= kSecretBytesMin && text.size() <= kSecretBytesMax && IsPrintable(text);
}

Result<std::vector<ApiKey>> ParseApiKeys(std::string_view text, std::string_view file) {
  std::vector<ApiKey> keys;
  std::istringstream lines{std::string(text)};
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    const auto fail = [&](const std::string& why) {
      return InvalidArgument(std::string(file) + ": line " + std::to_string(number) + ": " + why);
    };
    std::istringstream words(line);
    ApiKey key;
    std::string more;
    if (!(words >> key.name) || key.name.starts_with('#')) continue;
    if (!(words >> key.secret)) return fail("is not a name and a key");
    if (words >> more) return fail("has more than a name and a key");
    if (key.name.size() > kNameBytesMax || !IsPrintable(key.name)) {
      return fail("the name is not 1 to 64 printable characters");
    }
    if (!IsGoodSecret(key.secret)) return fail("the key is not 16 to 256 printable characters");
    const auto same = [&](const ApiKey& other) { return other.name == key.name; };
    if (std::any_of(keys.begin(), keys.end(), same)) return fail("the name stands there twice");
    keys.push_back(std::move(key));
  }
  if (keys.empty()) return InvalidArgument(std::string(file) + ": holds no key");
  return keys;
}

bool SameSecret(std::string_view given, std::string_view secret) {
  volatile unsigned difference = given.size() != secret.size() ? 1 : 0;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const char other = secret.empty() ? '\0' : secret[i % secret.size()];
    difference = difference | static_cast<unsigned char>(given[i] ^ other);
  }
  return difference == 0;
}

struct AccessControl::Impl : std::enable_shared_from_this<AccessControl::Impl> {
  struct Bucket {
    double tokens = 0;
    Clock::time_point filled;
  };

  std::string file;
  double per_second = 0;
  double burst = 1;
  std::int64_t in_flight_max = 0;
  Mutex mu;
  std::vector<ApiKey> keys ZEROC_GUARDED_BY(mu);
  FileVersion version ZEROC_GUARDED_BY(mu);
  Clock::time_point looked ZEROC_GUARDED_BY(mu);
  std::map<std::string, Bucket> buckets ZEROC_GUARDED_BY(mu);          // by client; as many as there are keys
  std::map<std::string, std::int64_t> in_flight ZEROC_GUARDED_BY(mu);  // by client; none is 0

  std::string ClientOf(std::string_view secret) const ZEROC_REQUIRES(mu);
  std::shared_ptr<const void> NewPass(const std::string& client) ZEROC_REQUIRES(mu);

  void ReloadIfChanged() ZEROC_REQUIRES(mu) {
    const Clock::time_point now = Clock::now();
    if (now - looked < std::chrono::seconds(1)) return;
    looked = now;
    const FileVersion found = VersionOf(file);
    if (found == version) return;
    version = found;
    Result<std::vector<ApiKey>> read = ReadKeys(file);
    if (!read.ok()) return LogWarning("API keys stay as they are: " + read.status().ToString());
    keys = std::move(*read);
    buckets.clear();
    LogInfo("API keys read again file=" + file + " keys=" + std::to_string(keys.size()));
  }

  // Seconds until the client may ask; 0: now, and that was counted.
  double Wait(const std::string& client) ZEROC_REQUIRES(mu) {
    if (per_second <= 0) return 0;
    const Clock::time_point now = Clock::now();
    const auto [entry, is_new] = buckets.try_emplace(client, Bucket{burst, now});
    Bucket& bucket = entry->second;
    bucket.tokens += std::chrono::duration<double>(now - bucket.filled).count() * per_second;
    bucket.tokens = std::min(bucket.tokens, burst);
    bucket.filled = now;
    if (bucket.tokens < 1) return (1 - bucket.tokens) / per_second;
    bucket.tokens -= 1;
    return 0;
  }
};

AccessControl::AccessControl(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
AccessControl::~AccessControl() = default;

Result<std::unique_ptr<AccessControl>> AccessControl::Open(const AccessOptions& options) {
  const std::string& keys_file = options.keys_file;
  auto impl = std::make_shared<Impl>();
  impl->file = keys_file;
  impl->per_second = options.requests_per_minute / 60;
  impl->in_flight_max = options.in_flight_max;
  impl->burst = std::max(1.0, impl->per_second * kBurstSeconds);
  if (!keys_file.empty()) {
    MutexLock lock(impl->mu);
    impl->version = VersionOf(keys_file);
    ZEROC_ASSIGN_OR_RETURN(impl->keys, ReadKeys(keys_file));
    struct stat info {};
    if (stat(keys_file.c_str(), &info) == 0 && (info.st_mode & (S_IRGRP | S_IROTH)) != 0) {
      LogWarning("API keys file=" + keys_file + " can be read by other users of this machine");
    }
  }
  return std::unique_ptr<AccessControl>(new AccessControl(std::move(impl)));
}

// The key's name; empty when it is not known. Every key is compared, so that the time does not tell which one was
// nearly right.
std::string AccessControl::Impl::ClientOf(std::string_view secret) const {
  std::string client;
  if (secret.size() > kSecretBytesMax) return client;
  for (const ApiKey& key : keys) {
    if (SameSecret(secret, key.secret)) client = key.name;
  }
  return client;
}

std::shared_ptr<const void> AccessControl::Impl::NewPass(const std::string& client) {
  ++in_flight[client];
  return {this, [self = shared_from_this(), client](const void*) {
            MutexLock lock(self->mu);
            const auto entry = self->in_flight.find(client);
            if (--entry->second == 0) self->in_flight.erase(entry);
          }};
}

AccessControl::Decision AccessControl::Admit(std::string_view authorization) {
  Decision decision;
  decision.client = kAnyone;
  MutexLock lock(impl_->mu);
  if (!impl_->file.empty()) {
    impl_->ReloadIfChanged();
    constexpr std::string_view kBearer = "Bearer ";
    const bool bearer = authorization.starts_with(kBearer) || authorization.starts_with("bearer ");
    const std::string_view given = bearer ? authorization.substr(kBearer.size()) : std::string_view();
    decision.client = impl_->ClientOf(given);
    if (decision.client.empty()) {
      decision.status = {StatusCode::kUnauthenticated, given.empty() ? "an API key is needed: Authorization: Bearer KEY"
                                                                     : "this API key is not known"};
      return decision;
    }
  }
  const auto running = impl_->in_flight.find(decision.client);
  if (impl_->in_flight_max > 0 && running != impl_->in_flight.end() && running->second >= impl_->in_flight_max) {
    decision.status = ResourceExhausted("client " + decision.client + " has " + std::to_string(running->second) +
                                        " requests in flight already");
    decision.retry_after_s = 1;
    return decision;
  }
  if (const double wait = impl_->Wait(decision.client); wait > 0) {
    decision.status = ResourceExhausted("too many requests of client " + decision.client);
    decision.retry_after_s = static_cast<int>(std::ceil(wait));
    return decision;
  }
  decision.pass = impl_->NewPass(decision.client);
  return decision;
}

}  // namespace zeroc
