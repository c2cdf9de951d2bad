#!/usr/bin/env bash
# Brings a node's locked environment, and puts its Python and its Ray first in the PATH. Done again, it changes nothing.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

# Ubuntu comes without make and venv. A machine that has just started may still be installing its updates: wait for it.
if ! command -v make > /dev/null || ! "$python" -c 'import ensurepip' 2> /dev/null; then
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq make python3-venv
fi

make --no-print-directory -C "$project" setup PYTHON="$python"

line="export PATH=\"$project/.venv/bin:\$PATH\" RAY_AUTH_MODE=token"
touch ~/.bashrc
grep -qxF "$line" ~/.bashrc || echo "$line" >> ~/.bashrc
