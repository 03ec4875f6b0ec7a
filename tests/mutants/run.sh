#!/usr/bin/env bash
# Breaks one rule of production code at a time and sees that the simulation notices.
#
#   tests/mutants/run.sh [NAME...]     all of them, or those named
#
# Each patch of this folder is applied to a copy of the tree under target/mutants, built and given SEEDS lives
# (default 500). Prints who was caught and after how many lives; exit 1 when one survives.
set -eu
cd "$(dirname "$0")/../.."

root=$PWD
place=$root/target/mutants
tree=$place/tree
seeds=${SEEDS:-500}
names=${*:-$(basename -a -s .patch tests/mutants/*.patch)}
survivors=0

# A fresh copy with fresh times: whatever an earlier run left broken is built anew.
rm -rf "$tree"
mkdir -p "$tree"
git ls-files -z | xargs -0 cp --parents -t "$tree"
table=$place/table.txt
: > "$table"
for name in $names; do
  patch -s -p1 -d "$tree" < "tests/mutants/$name.patch"
  if ! (cd "$tree" && CARGO_TARGET_DIR=$place/build cargo build --locked -q -p kvferry-tests --bin sim); then
    echo "mutants: $name does not build" >&2
    exit 2
  fi
  if "$place/build/debug/sim" --seeds "$seeds" > "$place/$name.log" 2>&1; then
    verdict="SURVIVES $seeds lives"
    survivors=1
  else
    verdict=$(grep -o 'breaks a rule after.*' "$place/$name.log" | cut -c1-110)
  fi
  printf '%-40s %s\n' "$name" "$verdict" | tee -a "$table"
  # What is put back must be newer than what was built of the broken one.
  patch -s -R -p1 -d "$tree" < "tests/mutants/$name.patch"
done
exit $survivors
