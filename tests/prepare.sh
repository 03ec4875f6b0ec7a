#!/usr/bin/env bash
# Says what a make target needs and installs what is missing, with apt: as root, or with `sudo -n`.
# Where it may not, it stops with the exact line to run. KVFERRY_NO_INSTALL=1 only looks.
#
#   tests/prepare.sh demo | test | test-full | python | late-writes-peers
set -eu
cd "$(dirname "$0")/.."

target=${1:?usage: tests/prepare.sh demo|test|test-full|python|late-writes-peers}

# command:package, of what is run. Debian's and Ubuntu's names.
needs="git:git make:make cc:build-essential"
case $target in
  demo | test) ;;
  test-full) needs="$needs strace:strace" ;;
  python) needs="$needs python3:python3 readelf:binutils" ;;
  late-writes-peers) needs="$needs python3:python3" ;;
  *)
    echo "prepare: no such target: $target" >&2
    exit 2
    ;;
esac

say() { echo "prepare: $*"; }

names="cargo"
missing=""
for need in $needs; do
  names="$names ${need%%:*}"
  command -v "${need%%:*}" > /dev/null 2>&1 || missing="$missing ${need##*:}"
done
# Debian ships Python without the part that makes virtual environments.
if [ "$target" = late-writes-peers ] || [ "$target" = python ]; then
  names="$names python3-venv"
  python3 -c 'import venv, ensurepip' 2> /dev/null || missing="$missing python3-venv"
fi
say "make $target needs: $names"

if [ -n "$missing" ]; then
  line="apt-get install -y --no-install-recommends$missing"
  if [ "${KVFERRY_NO_INSTALL:-}" = 1 ]; then
    say "missing, and KVFERRY_NO_INSTALL=1 is set; run: $line" >&2
    exit 1
  elif ! command -v apt-get > /dev/null 2>&1; then
    say "missing, and there is no apt-get here; install:$missing" >&2
    exit 1
  elif [ "$(id -u)" = 0 ]; then
    sudo=""
  elif sudo -n true 2> /dev/null; then
    sudo="sudo -n"
  else
    say "missing, and this user may not install; run: sudo $line" >&2
    exit 1
  fi
  say "installing:$missing"
  $sudo apt-get update -qq < /dev/null
  # shellcheck disable=SC2086 # words are wanted
  $sudo env DEBIAN_FRONTEND=noninteractive $line < /dev/null
fi

# A toolchain is the user's own: it is named, not installed. rustup fetches the pinned one by itself.
if ! command -v cargo > /dev/null 2>&1; then
  say "cargo is missing; run: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2
  exit 1
fi
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
have=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n1)" != "$wanted" ]; then
  say "rustc $have is older than $wanted; run: rustup toolchain install" >&2
  exit 1
fi
say "ready: rustc $have"
