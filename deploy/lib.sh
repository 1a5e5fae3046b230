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
