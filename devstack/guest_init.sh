#!/bin/sh
# PID 1 of the test guest (busybox). What it prints on the serial console is read by tests:
#
#   compute-agent guest is up
#   guest: vcpus=<n> memory_kib=<n> disk_sectors=<n>     again whenever one of them changes
#   guest: boots=<n>                                      kept on the disk, so snapshots take it back
#   guest: other=<disk> sectors=<n> boots=<n>             one line per further virtio disk; boots as that disk has it
#   guest: mac=<address>                                  one line per interface
#   seed: label=<cidata|config-2>  or  seed: none
#   seed: instance-id=<id>
#   seed: user-data-first-line=<text>
#   seed: ssh-key=<first public key>                      empty when there is none
#   seed: network-config=<present|absent>
#   guest: mark=<text>                                    what the kernel command line says as test.mark=<text>
#   disk: name=<vdb> sectors=<n> serial=<text> type=<ext4|swap|iso9660|none> label=<text>
#                                                         one line per disk; all again when one comes or goes
#   disk: swap=<vdc> kib=<n>                              a swap disk, switched on
#   disk: written=<vdd> read=<text>                       a disk whose serial number begins with write-
#   guest: firmware=<bios|efi>
#   guest: cpu-model=<text>  and  guest: cpu-flags=<flags>
#   guest: cpu<n> package=<n> die=<n> core=<n>            one line per CPU
#   guest: node<n> cpus=<list> memory_kib=<n>             one line per NUMA node
#   guest: watchdog=<driver>
#   guest: share=<first line of `hello`>                  of the virtiofs share `data`; the guest writes `answer` to it
#   guest: act <what>                                     see guest_acts
#   guest: tick <n>                                       1 to 5, one a second, then silence
#   guest: data sha256=<hex>                              only for user-data "#writer": of the 8 MiB at 80 MiB of its disk
#   guest: wrote <n>                                      then two of these a second, for ever
#   guest: powering off                                   after the ACPI power button

export PATH=/bin

load() {
  while read -r module; do
    insmod "/modules/${module}.ko" 2>/dev/null
  done <"/modules/$1"
}

facts() {
  for online in /sys/devices/system/cpu/cpu*/online; do
    # A plugged vCPU waits for somebody to switch it on.
    { read -r state <"${online}" && [ "${state}" = 0 ] && echo 1 >"${online}"; } 2>/dev/null
  done
  for block in /sys/devices/system/memory/memory*/state; do
    # So does plugged memory; movable, so that it can be taken away again.
    { read -r state <"${block}" && [ "${state}" = offline ] && echo online_movable >"${block}"; } 2>/dev/null
  done
  sectors=0
  for disk in sda vda; do
    [ -e "/sys/block/${disk}/size" ] && read -r sectors <"/sys/block/${disk}/size"
  done
  while read -r key value _; do
    [ "${key}" = MemTotal: ] && memory="${value}" && break
  done </proc/meminfo
  cpus=0
  for cpu in /sys/bus/cpu/devices/*; do
    state=1
    { read -r state <"${cpu}/online"; } 2>/dev/null
    cpus=$((cpus + state))
  done
  now="guest: vcpus=${cpus} memory_kib=${memory} disk_sectors=${sectors}"
  [ "${now}" = "${last}" ] || echo "${now}"
  last="${now}"
}

count_boot() {
  # A sector of the gap between the boot record and the first partition, free by convention.
  [ -b /dev/vda ] || return
  boots="$(dd if=/dev/vda bs=512 skip=1024 count=1 2>/dev/null | tr -cd '0-9')"
  boots=$((${boots:-0} + 1))
  printf '%-511s\n' "${boots}" | dd of=/dev/vda bs=512 seek=1024 count=1 conv=fsync,notrunc 2>/dev/null
  echo "guest: boots=${boots}"
}

other_disks() {
  for disk in /sys/block/vd[b-z]; do
    [ -e "${disk}/size" ] || continue
    read -r sectors <"${disk}/size"
    boots="$(dd if="/dev/${disk##*/}" bs=512 skip=1024 count=1 2>/dev/null | tr -cd '0-9')"
    echo "guest: other=${disk##*/} sectors=${sectors} boots=${boots:-0}"
  done
}

power_button() {
  for device in /sys/class/input/event*; do
    read -r name <"${device}/device/name"
    if [ "${name}" = "Power Button" ]; then
      (
        # Blocks until the first key event.
        dd if="/dev/input/${device##*/}" of=/dev/null bs=24 count=1 2>/dev/null
        echo "guest: powering off"
        sync
        poweroff -f
      ) &
    fi
  done
}

find_seed() {
  for device in /dev/sr0 /dev/sr1 /dev/vdb /dev/vdc /dev/sda /dev/sdb; do
    [ -b "${device}" ] || continue
    # The volume label of an ISO 9660 image: 32 bytes at 32808.
    label="$(dd if="${device}" bs=8 skip=4101 count=4 2>/dev/null | tr -d ' \0')"
    case "${label}" in
      cidata | CIDATA | config-2 | CONFIG-2)
        mount -t iso9660 -o ro "${device}" /seed 2>/dev/null && return 0
        ;;
    esac
  done
  return 1
}

report_seed() {
  echo "seed: label=${label}"
  if [ -f /seed/meta-data ]; then
    user=/seed/user-data
    network=/seed/network-config
    id="$(sed -n 's/^ *"\{0,1\}instance-id"\{0,1\}: *"\{0,1\}\([^",]*\)"\{0,1\},\{0,1\} *$/\1/p' /seed/meta-data | head -n 1)"
  else
    user=/seed/openstack/latest/user_data
    network=/seed/openstack/latest/network_data.json
    id="$(tr ',{' '\n\n' </seed/openstack/latest/meta_data.json | sed -n 's/.*"uuid": *"\([^"]*\)".*/\1/p' | head -n 1)"
  fi
  echo "seed: instance-id=${id}"
  echo "seed: user-data-first-line=$(head -n 1 "${user}" 2>/dev/null)"
  key="$(find /seed -type f -exec grep -h -o -E '(ssh-(rsa|ed25519|dss)|ecdsa-[a-z0-9-]+) [A-Za-z0-9+/=]+' {} + | head -n 1)"
  echo "seed: ssh-key=${key}"
  if [ -s "${network}" ]; then
    echo "seed: network-config=present"
  else
    echo "seed: network-config=absent"
  fi
}

serial_of() {
  # SCSI and ATA disks tell it in a page of binary data.
  cat "/sys/block/$1/serial" 2>/dev/null || tr -cd 'a-zA-Z0-9-' <"/sys/block/$1/device/vpd_pg80" 2>/dev/null
}

bytes() {
  dd if="$1" bs=1 skip="$2" count="$3" 2>/dev/null | tr -d '\0'
}

content_of() {
  if [ "$(bytes "$1" 1080 2)" = "$(printf 'S\357')" ]; then
    echo "type=ext4 label=$(bytes "$1" 1144 16)"
  elif [ "$(bytes "$1" 4086 10)" = SWAPSPACE2 ]; then
    echo "type=swap label=$(bytes "$1" 1052 16)"
  elif [ "$(bytes "$1" 32769 5)" = CD001 ]; then
    echo "type=iso9660 label=$(bytes "$1" 32808 32 | tr -d ' ')"
  else
    echo "type=none label="
  fi
}

use_disk() {
  case "$3" in
    type=swap*)
      swapon "/dev/$1" 2>/dev/null && while read -r device _ kib _; do
        [ "${device}" = "/dev/$1" ] && echo "disk: swap=$1 kib=${kib}"
      done </proc/swaps
      ;;
  esac
  case "$2" in
    write-*)
      printf '%-511s\n' "PLAIN TEXT OF THE GUEST" | dd of="/dev/$1" bs=512 seek=8 count=1 conv=fsync,notrunc 2>/dev/null
      echo "disk: written=$1 read=$(dd if="/dev/$1" bs=512 skip=8 count=1 2>/dev/null | head -c 23)"
      ;;
  esac
}

report_disks() {
  present="$(cd /sys/block && echo vd[a-z]* sd[a-z]* sr[0-9]*)"
  [ "${present}" = "${reported}" ] && return
  reported="${present}"
  for path in /sys/block/vd* /sys/block/sd* /sys/block/sr*; do
    [ -e "${path}/size" ] || continue
    name="${path##*/}"
    read -r sectors <"${path}/size"
    serial="$(serial_of "${name}")"
    found="$(content_of "/dev/${name}")"
    echo "disk: name=${name} sectors=${sectors} serial=${serial} ${found}"
    use_disk "${name}" "${serial}" "${found}"
  done
}

hardware() {
  if [ -d /sys/firmware/efi ]; then echo "guest: firmware=efi"; else echo "guest: firmware=bios"; fi
  echo "guest: cpu-model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
  echo "guest: cpu-flags=$(sed -n 's/^flags[^:]*: //p' /proc/cpuinfo | head -n 1)"
  for topology in /sys/devices/system/cpu/cpu*/topology; do
    [ -e "${topology}/core_id" ] || continue
    read -r package <"${topology}/physical_package_id"
    read -r core <"${topology}/core_id"
    die=0
    { read -r die <"${topology}/die_id"; } 2>/dev/null
    cpu="${topology%/topology}"
    echo "guest: ${cpu##*/} package=${package} die=${die} core=${core}"
  done
  for node in /sys/devices/system/node/node*; do
    [ -e "${node}/cpulist" ] || continue
    memory="$(sed -n 's/^.*MemTotal: *\([0-9]*\) kB$/\1/p' "${node}/meminfo")"
    echo "guest: ${node##*/} cpus=$(cat "${node}/cpulist") memory_kib=${memory}"
  done
  [ -e /sys/class/watchdog/watchdog0/identity ] && echo "guest: watchdog=$(cat /sys/class/watchdog/watchdog0/identity)"
  if mount -t virtiofs data /share 2>/dev/null; then
    echo "answer of the guest" >/share/answer
    echo "guest: share=$(head -n 1 /share/hello)"
  fi
}

# Data that can be found again from outside, then pairs of sectors of which the first is written first: an image of
# one moment has the same number in both, or one more in the first.
write_for_ever() {
  dd if=/dev/urandom of=/dev/vda bs=1048576 seek=80 count=8 conv=fsync,notrunc 2>/dev/null
  echo 3 >/proc/sys/vm/drop_caches
  sum="$(dd if=/dev/vda bs=1048576 skip=80 count=8 2>/dev/null | sha256sum)"
  echo "guest: data sha256=${sum%% *}"
  n=0
  while :; do
    n=$((n + 1))
    for sector in 204800 206848; do
      printf '%-511s\n' "${n}" | dd of=/dev/vda bs=512 seek="${sector}" count=1 conv=fsync,notrunc 2>/dev/null
    done
    echo "guest: wrote ${n}"
    sleep 0.5
  done
}

guest_acts() {
  # Lines of the user data such as "guest-act: 1 panic": what to do in that boot, counted on the disk.
  [ -f "${user}" ] || return
  while read -r key boot what; do
    [ "${key}" = guest-act: ] && [ "${boot}" = "${boots}" ] || continue
    echo "guest: act ${what}"
    case "${what}" in
      panic) echo c >/proc/sysrq-trigger ;;
      poweroff) poweroff -f ;;
      talk)
        (
          words=0
          while sleep 0.5; do
            words=$((words + 1))
            echo "guest: word ${words}"
          done
        ) &
        ;;
    esac
  done <"${user}"
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
load first
exec </dev/console >/dev/console 2>&1
# Before it says that it is up: whoever reads that may press the button at once.
power_button
echo "compute-agent guest is up"
facts
case "$(cat /proc/cmdline)" in
  *test.mark=*) echo "guest: mark=$(sed 's/.*test.mark=\([^ ]*\).*/\1/' </proc/cmdline)" ;;
esac
count_boot
other_disks
for nic in /sys/class/net/*; do
  [ "${nic##*/}" = lo ] || echo "guest: mac=$(cat "${nic}/address")"
done
load second
# The controllers probe their ports in the background; an empty drive needs no seed, so the wait is short.
tries=0
until find_seed; do
  tries=$((tries + 1))
  [ "${tries}" -ge 15 ] && break
  sleep 0.2
done
if [ "${tries}" -lt 15 ]; then
  report_seed
  guest_acts
  [ "$(head -n 1 "${user}" 2>/dev/null)" = "#writer" ] && write_for_ever
else
  echo "seed: none"
fi
report_disks
hardware
tick=1
while [ "${tick}" -le 5 ]; do
  echo "guest: tick ${tick}"
  tick=$((tick + 1))
  sleep 1
  facts
  report_disks
done
while :; do
  sleep 2
  facts
  report_disks
done
