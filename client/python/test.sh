#!/usr/bin/env bash
# Builds the wheel and the daemon, installs the wheel into a virtual environment of its own, and runs its tests.
set -eu
cd "$(dirname "$0")/../.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
rm -rf "$target/wheel"
client/python/wheel.sh dev "$target/wheel"
cargo clippy --quiet --locked -p kvferry-python -- -D warnings
cargo build --quiet --locked -p kvferryd --bins
venv=$target/python
"$venv/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps "$target"/wheel/kvferry-*.whl
# The module stands on the C library alone: no RDMA, no CUDA, no libpython.
native=$("$venv/bin/python" -c 'import kvferry._native as native; print(native.__file__)')
if readelf -d "$native" | grep NEEDED | grep -vE 'lib(c|m|gcc_s|pthread|dl|rt)\.so|ld-linux'; then
  echo "the native module needs a library that engines may not have" >&2
  exit 1
fi
KVFERRYD_BIN=$target/debug/kvferryd "$venv/bin/python" -m unittest discover -s client/python/tests "$@"
