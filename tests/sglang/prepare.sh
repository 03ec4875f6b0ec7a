#!/usr/bin/env bash
# Brings sglang from PyPI into a virtual environment of its own, below the build folder, with what its disaggregation
# modules import and no more: no kernels, no models.
#
#   tests/sglang/prepare.sh FOLDER     afterwards FOLDER/bin/python has sglang, and FOLDER/ready is there
set -eu
folder=${1:?usage: tests/sglang/prepare.sh FOLDER}
needs=$(dirname "$0")/requirements.txt

# What is there was made from the same list.
if cmp -s "$needs" "$folder/ready"; then
  exit 0
fi
echo "prepare: sglang and what it imports go to $folder: some 3 GB from PyPI, most of it torch"
python=""
for name in python3.11 python3.12 python3.13 python3; do
  if command -v "$name" > /dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python=$name
    break
  fi
done
[ -n "$python" ] || { echo "prepare: sglang needs Python 3.11 or later" >&2; exit 1; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
# Every package is in the list: what else they would like to have is never imported here.
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$needs"
cp "$needs" "$folder/ready"
