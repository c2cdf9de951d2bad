#!/usr/bin/env bash
# Begin a search or, if storage has one of that name, resume it. What runs this again after a failure needs no state of
# its own.
#
#   bash cluster/search.sh --name NAME --storage DIR_OR_URI -- --space runs10 --data DATA --address auto
set -euo pipefail

usage() {
  echo "usage: search.sh --name NAME --storage DIR_OR_URI -- FLAGS OF tune_bisenet.run" >&2
  exit 2
}

name='' storage=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [ $# -gt 1 ] || usage
  case $1 in
    --name) name=$2 ;;
    --storage) storage=$2 ;;
    *) usage ;;
  esac
  shift 2
done
[ -n "$name" ] && [ -n "$storage" ] && [ "${1:-}" = -- ] || usage
shift

resume=$(python -c '
import sys
from tune_bisenet.storage import Storage
print("--resume" if (Storage.at(sys.argv[1]) / sys.argv[2]).exists("search.json") else "")
' "$storage" "$name")

# shellcheck disable=SC2086  # nothing, or one word
exec python -m tune_bisenet.run --name "$name" --storage "$storage" $resume "$@"
