#!/usr/bin/env bash
# Builds the wheel of the Python package.
#
#   client/python/wheel.sh [PROFILE] [FOLDER]     release and dist, or dev: quicker to build, for tests
#
# maturin comes from PyPI into a virtual environment under target/.
set -eu
cd "$(dirname "$0")/../.."
profile=${1:-release}
folder=${2:-dist}
venv=${CARGO_TARGET_DIR:-target}/python

[ -x "$venv/bin/maturin" ] || {
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check 'maturin>=1.9.4,<2' numpy
}
"$venv/bin/maturin" build --quiet --locked --profile "$profile" -m client/python/Cargo.toml -o "$folder"
