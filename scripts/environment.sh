# Sourced by the other scripts: makes .venv in the repository and installs jepa_scale into it, once.
#
# PYTHON           interpreter to make .venv with (default python3; 3.11 or newer)
# TORCH_INDEX_URL  where to take torch from, if not the default index: on a Linux machine without a GPU, PyTorch's
#                  install page names an index of CPU builds that saves several GB
# EXTRAS           extras to install (default: dev)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
extras=${EXTRAS:-dev}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "jepa_scale needs Python 3.11 or newer; set PYTHON to one ($python is $("$python" --version 2>&1))" >&2
  exit 2
}

stamp=.venv/.installed
want="$extras $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing into .venv (a few minutes the first time) …"
  pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
  "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
  "${pip[@]}" setuptools wheel packaging
  # DeepSpeed builds from source and must see the torch just installed; none of its compiled operators is used
  DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation --editable ".[$extras]"
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && [ "${SKIP_FLASH_ATTN:-0}" = 0 ]; then
    "${pip[@]}" --no-build-isolation --editable ".[gpu]" || echo "flash-attn did not install; PyTorch's varlen attention serves instead"
  fi
  echo "$want" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
