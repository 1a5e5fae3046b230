#!/usr/bin/env bash
# Proves that a bare Debian 12 is enough: makes one with debootstrap, puts a fresh clone of HEAD in it and runs
# deploy/demo and deploy/test there, as a new user of the project would. Needs root and the debootstrap package.
#
#   tests/clean_machine.sh                     the two commands, in a temporary folder that is removed afterwards
#   tests/clean_machine.sh --dir DIR           keep the system in DIR, and use it again when it is there
#   tests/clean_machine.sh [..] -- COMMAND..   run another command in the clone
#
# The mirror, the proxy settings and the resolver are those of this machine at run time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/lib.sh"

dir='' command=(bash -c './deploy/demo && ./deploy/test')
while (($#)); do
  case "$1" in
    --dir) [[ ${2:-} ]] || bad_usage "--dir needs a folder"; dir=$2; shift ;;
    --) shift; command=("$@"); break ;;
    -h | --help) print_help; exit 0 ;;
    *) bad_usage "unknown argument: $1" ;;
  esac
  shift
done
[[ $(id -u) == 0 ]] || die "needs root (debootstrap and chroot do)"
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"

if [[ -z $dir ]]; then
  dir=$(mktemp -d /var/tmp/zeroc-clean.XXXXXX)
  # Mounts live in a namespace of their own and are gone before this runs.
  trap 'rm -rf --one-file-system "$dir"' EXIT
fi
root=$dir/root

# The first bookworm mirror of either form of apt source.
apt_mirror() {
  cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null |
    awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; exit } }'
}

if [[ ! -e $root/etc/debian_version ]]; then
  mirror=$(apt_mirror)
  [[ $mirror ]] || die "no mirror in this machine's apt sources"
  note "debootstrap into $root"
  debootstrap --variant=minbase bookworm "$root" "$mirror" >"$dir/debootstrap.log" 2>&1 ||
    { tail -n 20 "$dir/debootstrap.log" >&2; die "debootstrap failed"; }
fi

# Network settings of the host: sources, proxy and validity options, resolver.
cp -r /etc/apt/sources.list.d "$root/etc/apt/"
rm -f "$root/etc/apt/sources.list"
if [[ -f /etc/apt/sources.list ]]; then cp /etc/apt/sources.list "$root/etc/apt/"; fi
{ grep -ls '^Acquire' /etc/apt/apt.conf /etc/apt/apt.conf.d/* || true; } | xargs -r cp -t "$root/etc/apt/apt.conf.d/"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"

rm -rf "$root/src/zeroc"
mkdir -p "$root/src"
git clone --quiet --no-hardlinks "$ZEROC_ROOT" "$root/src/zeroc"

proxies=()
for name in http_proxy https_proxy no_proxy; do
  if [[ ${!name:-} ]]; then proxies+=("$name=${!name}"); fi
done
note "in a bare Debian 12: ${command[*]}"
# shellcheck disable=SC2016  # the inner shells expand these
# A namespace for mounts and one for processes: nothing mounted or started in there outlives the command.
unshare --mount --pid --fork --kill-child env -i HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" \
  PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${proxies[@]}" bash -c '
    set -e
    root=$1; shift
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sys "$root/sys"
    mkdir -p "$root/dev/shm"
    mount -t tmpfs tmpfs "$root/dev/shm"
    chroot "$root" /bin/sh -c "cd /src/zeroc && exec \"\$@\"" sh "$@" </dev/null
  ' bash "$root" "${command[@]}"
