#include "libzeroc/comm/ucx/ucx_host.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <span>
#include <sstream>

#include "libzeroc/comm/checksum.h"
#include "libzeroc/comm/ucx/ucx_envelope.h"

namespace zeroc {
namespace {

constexpr std::size_t kIdentityBytes = 21;

std::string ReadLink(const char* path) {
  char target[128];
  const ssize_t size = ::readlink(path, target, sizeof target);
  return size > 0 ? std::string(target, static_cast<std::size_t>(size)) : std::string("?");
}

// Field 22 of /proc/PID/stat, counted after the command name, which may hold blanks and brackets. 0: no such process.
std::uint64_t StartTime(std::uint32_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string stat;
  std::getline(file, stat);
  const std::size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream fields(stat.substr(name_end + 1));
  std::string field;
  for (int i = 3; i < 22; ++i) fields >> field;
  std::uint64_t start = 0;
  fields >> start;
  return start;
}

void AppendInteger(std::uint64_t value, int bytes, std::string& out) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>((value >> (8 * i)) & 0xff));
}

std::uint64_t TakeInteger(std::string_view& from, std::size_t bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < bytes; ++i) value |= std::uint64_t{static_cast<unsigned char>(from[i])} << (8 * i);
  from.remove_prefix(bytes);
  return value;
}

}  // namespace

ProcessIdentity ThisProcess(bool shared_memory) {
  std::string host;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), host);
  host += ReadLink("/proc/self/ns/pid") + ReadLink("/proc/self/ns/ipc");
  ProcessIdentity process;
  process.host = Checksum64(std::as_bytes(std::span(host)));
  process.pid = static_cast<std::uint32_t>(::getpid());
  process.start = StartTime(process.pid);
  process.shared_memory = shared_memory;
  return process;
}

Result<int> WatchProcess(const ProcessIdentity& process) {
  const std::string who = "process " + std::to_string(process.pid);
  const int fd = static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(process.pid), 0u));
  if (fd < 0 && errno == ESRCH) return Unavailable(who + " is dead");
  if (fd < 0) return Unimplemented(who + " cannot be watched: " + std::strerror(errno));
  if (StartTime(process.pid) == process.start) return fd;  // read after the descriptor was taken, so it names this one
  ::close(fd);
  return Unavailable(who + " is dead, its number belongs to another process now");
}

std::string EncodeUcxAddress(const UcxAddress& address) {
  std::string plain;
  AppendInteger(address.process.host, 8, plain);
  AppendInteger(address.process.start, 8, plain);
  AppendInteger(address.process.pid, 4, plain);
  AppendInteger(address.process.shared_memory ? 1 : 0, 1, plain);
  plain += address.worker;
  return SealUcx(plain);
}

Result<UcxAddress> DecodeUcxAddress(std::string_view sealed) {
  std::string plain;
  ZEROC_ASSIGN_OR_RETURN(plain, UnsealUcx(sealed, "address"));
  if (plain.size() <= kIdentityBytes) return InvalidArgument("ucx: address: truncated");
  std::string_view rest(plain);
  UcxAddress address;
  address.process.host = TakeInteger(rest, 8);
  address.process.start = TakeInteger(rest, 8);
  address.process.pid = static_cast<std::uint32_t>(TakeInteger(rest, 4));
  address.process.shared_memory = TakeInteger(rest, 1) == 1;
  address.worker = std::string(rest);
  return address;
}

}  // namespace zeroc
