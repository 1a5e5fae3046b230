# shellcheck shell=bash
# Shared by the scripts beside it: messages, the project root, the compiler cache. Sourced, never run.
# Callers set -euo pipefail first.

ZEROC_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Cached objects stay valid when the project is checked out elsewhere.
export CCACHE_BASEDIR="$ZEROC_ROOT" CCACHE_NOHASHDIR=1

say() { printf '%s\n' "$*"; }
note() { printf '%s: %s\n' "${0##*/}" "$*"; }
warn() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
  warn "$*"
  exit 1
}
# Bad usage has its own exit code, as in the zeroc tool.
bad_usage() {
  warn "$* (see ${0##*/} --help)"
  exit 2
}

# The text between the shebang and the first line that is no comment is a script's help.
print_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# Compiler jobs: one per core, but one per 2 GiB of memory at most, because a gRPC file takes more than 1 GiB.
build_jobs() {
  local cores mem_gib
  cores=$(nproc)
  mem_gib=$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' /proc/meminfo)
  local jobs=$((mem_gib / 2 < cores ? mem_gib / 2 : cores))
  echo $((jobs > 0 ? jobs : 1))
}

# Prints N TCP ports that nothing on this machine uses now, one a line. They lie below the range from which the kernel
# takes ports for outgoing connections, so that nothing takes them by chance before they are bound.
free_ports() {
  local used port count=0 tries
  used=" $(awk 'FNR > 1 { split($2, a, ":"); print a[2] }' /proc/net/tcp /proc/net/tcp6 2>/dev/null | tr '\n' ' ') "
  for ((tries = 0; tries < 10000 && count < $1; tries++)); do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    if [[ $used == *" $(printf '%04X' $port) "* ]]; then continue; fi
    used+="$(printf '%04X' $port) "
    echo $port
    count=$((count + 1))
  done
  ((count == $1)) || die "found no $1 free TCP ports"
}

# Ends the given processes: SIGTERM to all, at most 10 seconds to drain, then SIGKILL.
stop_pids() {
  local pid tries=0
  kill -TERM "$@" 2>/dev/null || true
  for pid in "$@"; do
    while kill -0 "$pid" 2>/dev/null; do
      if ((++tries > 100)); then
        warn "process $pid did not end on SIGTERM within 10 s: SIGKILL"
        kill -KILL "$pid" 2>/dev/null || true
        break
      fi
      sleep 0.1
    done
  done
}
