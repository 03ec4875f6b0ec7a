#!/usr/bin/env bash
# Brings the transfer engine that users have today into a virtual environment of its own, below the build folder: the
# wheel from PyPI, and the libraries it links, which are unpacked beside it and not installed.
#
#   tests/peers/prepare.sh FOLDER     afterwards FOLDER/python runs a script with it
set -eu
folder=${1:?usage: tests/peers/prepare.sh FOLDER}
wheel=mooncake-transfer-engine-non-cuda==0.3.13.post1

if [ ! -x "$folder/bin/python3" ]; then
  python3 -m venv "$folder"
fi
"$folder/bin/python3" -m pip install --quiet --disable-pip-version-check "$wheel" numpy

# The wheel does not bring libibverbs and what that needs.
if ! ldconfig -p | grep -q libibverbs.so.1 && [ ! -d "$folder/root" ]; then
  mkdir -p "$folder/deb"
  (
    cd "$folder/deb"
    packages="libibverbs1 libnl-3-200 libnl-route-3-200"
    # shellcheck disable=SC2086 # words are wanted
    apt-get download -qq $packages 2> /dev/null || { apt-get update -qq && apt-get download -qq $packages; }
  )
  for package in "$folder"/deb/*.deb; do
    dpkg-deb -x "$package" "$folder/root"
  done
fi
libraries=$(find "$folder" -path '*/root/*' -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
cat > "$folder/python" << END
#!/bin/sh
LD_LIBRARY_PATH="$libraries" exec "$folder/bin/python3" "\$@"
END
chmod +x "$folder/python"
