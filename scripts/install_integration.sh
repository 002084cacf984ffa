#!/usr/bin/env bash
# Installs what tests/integration needs on Debian or Ubuntu: SLURM, munge, an ssh server, pdsh, network namespaces, a browser, tcmalloc.
# No service is started: the tests run daemons of their own, on ports and in folders of their own.
#
#   scripts/install_integration.sh
#
# Ends with 0 and prints the reason if it cannot install (no root, no apt, no network); the tests then skip with the reason.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

packages=(slurm-wlm munge openssh-server openssh-client pdsh iproute2 chromium fonts-dejavu-core libtcmalloc-minimal4)
programs=(slurmctld slurmd sbatch munged sshd ssh pdsh ip unshare chromium)

export PATH="$PATH:/usr/sbin:/sbin"
# an sshd that root starts wants this folder, which else its service makes
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd 2>/dev/null || true

missing=()
for program in "${programs[@]}"; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[[ $(ldconfig -p) == *libtcmalloc_minimal.so* ]] || missing+=(libtcmalloc_minimal)
[ ${#missing[@]} -gt 0 ] || exit 0

skip() { echo "integration tests: ${missing[*]} not installed: $1"; exit 0; }
[ "$(id -u)" = 0 ] || skip "needs root"
command -v apt-get >/dev/null || skip "needs apt-get"

# at runlevel 1 the packages' own scripts start nothing (invoke-rc.d(8))
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() { timeout 300 apt-get install --yes --quiet --no-install-recommends "${packages[@]}" >"$log" 2>&1 </dev/null; }
install || { timeout 120 apt-get update --quiet >"$log" 2>&1 && install; } || skip "apt-get: $(tail -n 1 "$log")"
