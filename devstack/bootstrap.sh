#!/usr/bin/env bash
# Make a Debian 12 host ready for the development stack and the integration tests.
#
#   devstack/bootstrap.sh packages   install the missing Debian packages, prepare /dev/kvm
#   devstack/bootstrap.sh venv       create .venv and install the pinned dependencies and this project
#   devstack/bootstrap.sh all        both (the default)
#   devstack/bootstrap.sh check      only say what is missing
#
# Idempotent: when nothing is to be done it takes about a second and changes nothing.
# Exit status: 0 ready; 1 a step failed; 2 wrong usage; 3 this host cannot be prepared (no root, no apt).

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly VENV="${ROOT}/.venv"
readonly POLICY=/usr/sbin/policy-rc.d
POLICY_IS_OURS=no

# What is needed, and what for. `packages` installs those that dpkg does not know as installed.
readonly PACKAGES=(
  python3 python3-venv python3-dev gcc libc6-dev pkg-config make  # .venv; libvirt-python is compiled
  rabbitmq-server                                                 # the broker
  libvirt-daemon-system libvirt-clients libvirt-dev               # the hypervisor's daemon
  libvirt-daemon-driver-lxc                                       # containers through libvirt
  qemu-system-x86 qemu-utils                                      # the hypervisor
  dnsmasq-base iproute2 iptables                                  # libvirt's networks
  busybox-static syslinux syslinux-common mtools                  # the guest image
  ovmf                                                            # UEFI for guests
  util-linux procps                                               # unshare, nsenter, mkswap, losetup
  e2fsprogs                                                       # mkfs.ext4
)

say() { printf 'bootstrap: %s\n' "$*"; }
complain() { printf 'bootstrap: %s\n' "$*" >&2; }

offer_the_embedded_way() {
  complain "The embedded way needs none of this: 'compute-agent demo' runs the agent with a simulated" \
    "hypervisor and an in-process bus."
}

missing_packages() {
  # --show exits 1 when it does not know a package; the comparison is on what it did print.
  local installed package
  installed="$(dpkg-query --show --showformat='${binary:Package} ${db:Status-Status}\n' "${PACKAGES[@]}" 2>/dev/null || true)"
  installed="$(sed -n 's/^\([^: ]*\)\(:[^ ]*\)\{0,1\} installed$/\1/p' <<<"${installed}")"
  for package in "${PACKAGES[@]}"; do
    grep -qxF -- "${package}" <<<"${installed}" || printf '%s\n' "${package}"
  done
}

forbid_service_starts() {
  # Maintainer scripts ask policy-rc.d before they start a service; 101 means "not allowed, and no error".
  # Without it a host that has no init system fails half-way through configuring rabbitmq-server.
  if [[ ! -e "${POLICY}" ]]; then
    POLICY_IS_OURS=yes
    trap restore_service_starts EXIT
    printf '#!/bin/sh\nexit 101\n' >"${POLICY}"
    chmod 0755 "${POLICY}"
  fi
}

restore_service_starts() {
  if [[ "${POLICY_IS_OURS}" == yes ]]; then
    rm -f "${POLICY}"
    POLICY_IS_OURS=no
  fi
}

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 \
    install --yes --no-install-recommends "$@"
}

prepare_kvm() {
  # libvirt probes QEMU again for every domain, a minute each, when it can open /dev/kvm and the QEMU user
  # cannot. These are the owner and mode that udev gives; a container's /dev has no udev.
  if [[ -c /dev/kvm && "$(id -u)" == 0 ]] && getent group kvm >/dev/null; then
    if [[ "$(stat -c '%G %a' /dev/kvm)" != "kvm 660" ]]; then
      if chgrp kvm /dev/kvm 2>/dev/null && chmod 0660 /dev/kvm 2>/dev/null; then
        say "gave /dev/kvm to group kvm (0660)"
      else
        complain "could not give /dev/kvm to group kvm; 'create' may take a minute"
      fi
    fi
  fi
}

check() {
  local status=0 package
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    complain "apt-get is missing: packages can only be installed on Debian or a derivative of it."
    status=3
  else
    while read -r package; do
      complain "the Debian package ${package} is missing; install it with: apt-get install --no-install-recommends ${package}"
      status=3
    done < <(missing_packages)
  fi
  return "${status}"
}

packages() {
  local -a missing
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    check || true
    offer_the_embedded_way
    return 3
  fi
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]} > 0)); then
    if [[ "$(id -u)" != 0 ]]; then
      check || true
      complain "root is missing: packages can only be installed as root (run: sudo ${BASH_SOURCE[0]} packages)."
      offer_the_embedded_way
      return 3
    fi
    say "installing: ${missing[*]}"
    forbid_service_starts
    if ! apt_install "${missing[@]}"; then
      # Stale lists are the usual reason: refresh them once, finish what is half configured, try again.
      apt-get -qq update
      dpkg --configure -a || true
      apt_install "${missing[@]}"
    fi
    restore_service_starts
  fi
  prepare_kvm
  say "packages are ready"
}

stamp_of_inputs() {
  # The interpreter is part of it: a venv does not survive a change of its Python.
  { cat "${ROOT}/constraints.txt" "${ROOT}/pyproject.toml"; python3 -V; printf '%s\n' "${ROOT}"; } \
    | sha256sum | cut -d' ' -f1
}

venv() {
  local stamp file
  for file in constraints.txt pyproject.toml; do
    if [[ ! -f "${ROOT}/${file}" ]]; then
      complain "${file} is missing in the root of the repository."
      return 1
    fi
  done
  if ! command -v python3 >/dev/null \
    || ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    complain "Python 3.11 or later is missing (python3)."
    offer_the_embedded_way
    return 3
  fi
  stamp="$(stamp_of_inputs)"
  if [[ -x "${VENV}/bin/python" && "$(cat "${VENV}/.stamp" 2>/dev/null || true)" == "${stamp}" ]]; then
    say ".venv is up to date"
    return 0
  fi
  if ! python3 -c 'import ensurepip' 2>/dev/null; then
    complain "the Python module ensurepip is missing; install the Debian package python3-venv."
    offer_the_embedded_way
    return 3
  fi
  say "making .venv"
  # No stamp while it is being changed: an interrupted installation is repeated.
  rm -f "${VENV}/.stamp"
  python3 -m venv "${VENV}"
  local -a pip=("${VENV}/bin/python" -m pip --disable-pip-version-check --no-input --quiet)
  "${pip[@]}" install --require-hashes -r "${ROOT}/constraints.txt"
  "${pip[@]}" install --no-deps -e "${ROOT}"
  printf '%s\n' "${stamp}" >"${VENV}/.stamp"
  say ".venv is ready"
}

main() {
  if (($# > 1)); then
    complain "usage: ${BASH_SOURCE[0]} [packages|venv|all|check]"
    return 2
  fi
  case "${1:-all}" in
    packages) packages ;;
    venv) venv ;;
    all)
      packages
      venv
      ;;
    check)
      if check; then
        say "nothing is missing"
      else
        offer_the_embedded_way
        return 3
      fi
      ;;
    *)
      complain "usage: ${BASH_SOURCE[0]} [packages|venv|all|check]"
      return 2
      ;;
  esac
}

main "$@"
