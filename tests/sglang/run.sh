#!/usr/bin/env bash
# Runs sglang's own prefill and decode over kvferry, with sglang as PyPI has it. It says what it moves.
#
#   [KVFERRY_WAY=drop-in|plugin] tests/sglang/run.sh [ARGUMENTS OF unittest discover]
set -eu
cd "$(dirname "$0")/../.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
place=$target/sglang
tests/sglang/prepare.sh "$place"
rm -rf "$target/wheel"
client/python/wheel.sh dev "$target/wheel"
cargo build --quiet --locked -p kvferryd --bins
"$place/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps "$target"/wheel/kvferry-*.whl
# Who starts daemons for the tests of the Python package starts them here too.
PYTHONPATH=client/python/tests KVFERRYD_BIN=$target/debug/kvferryd \
  "$place/bin/python" -m unittest discover -v -s tests/sglang "$@"
