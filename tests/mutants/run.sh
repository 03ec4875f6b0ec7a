#!/usr/bin/env bash
# Breaks one rule of production code at a time and sees that it is noticed.
#
#   tests/mutants/run.sh [NAME...]     all of them, or those named
#
# Each patch of this folder is applied to a copy of the tree under target/mutants and built. It is given SEEDS lives
# (default 500) of the simulation; one that breaks what the simulation does not run names, in a first line
# `# test: ARGUMENTS`, the tests that must fail. Prints who was caught and by what; exit 1 when one survives.
set -eu
cd "$(dirname "$0")/../.."

root=$PWD
place=$root/target/mutants
tree=$place/tree
seeds=${SEEDS:-500}
names=${*:-$(basename -a -s .patch tests/mutants/*.patch)}
survivors=0
export CARGO_TARGET_DIR=$place/build

# In the tree, with what cargo says kept out of the table.
build() {
  (cd "$tree" && cargo "$@") > "$log" 2>&1 || { cat "$log"; echo "mutants: $name does not build" >&2; exit 2; }
}

# True where the simulation finds nothing wrong.
lives() {
  build build --locked -q -p kvferry-tests --bin sim
  "$place/build/debug/sim" --seeds "$seeds" > "$log" 2>&1 && return
  verdict=$(grep -o 'breaks a rule after.*' "$log" | cut -c1-110)
  return 1
}

# True where the named tests pass. Process tests need the daemon itself. They run less long than they are built.
passes() {
  local -x CARGO_PROFILE_DEV_OPT_LEVEL=0
  # shellcheck disable=SC2086 # several arguments
  build test --locked -q --no-run $tests
  case $tests in *kvferry-tests*) build build --locked -q -p kvferryd -p kvferry-tests --bins ;; esac
  # shellcheck disable=SC2086 # several arguments
  (cd "$tree" && cargo test --locked $tests) > "$log" 2>&1 && return
  verdict="fails $(grep -E '^test .* FAILED$' "$log" | head -n 1 | cut -d' ' -f2)"
  # Whatever else ended it, no test did.
  [ "$verdict" != "fails " ] || { cat "$log"; exit 2; }
  return 1
}

# A fresh copy with fresh times: whatever an earlier run left broken is built anew.
rm -rf "$tree"
mkdir -p "$tree"
git ls-files -z | xargs -0 cp --parents -t "$tree"
table=$place/table.txt
: > "$table"
for name in $names; do
  log=$place/$name.log
  tests=$(sed -n '1s/^# test: //p' "tests/mutants/$name.patch")
  patch -s -p1 -d "$tree" < "tests/mutants/$name.patch"
  if [ -n "$tests" ]; then check=passes; else check=lives; fi
  if $check; then
    verdict="SURVIVES ${tests:-$seeds lives}"
    survivors=1
  fi
  printf '%-40s %s\n' "$name" "$verdict" | tee -a "$table"
  # What is put back must be newer than what was built of the broken one.
  patch -s -R -p1 -d "$tree" < "tests/mutants/$name.patch"
done
exit $survivors
