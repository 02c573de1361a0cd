#!/usr/bin/env bash
# Runs a script as root in a mount namespace of its own, in which the system can be changed: what is installed, added to
# /etc or made in /srv, /mnt and /home is gone at its end. Exits with 77 where that cannot be.
#   unshare --mount --propagation private namespace.sh DIRECTORY SCRIPT
set -euo pipefail
# Mounts of tests that run at the same time: as long as this namespace had them, they would not end.
awk '$3 == "fuse.freightfs" { print $2 }' /proc/mounts | while read -r other; do umount -l "$other" || true; done
layers=$1/layers
mkdir -p "$layers"
mount -t tmpfs tmpfs "$layers" 2>/dev/null || exit 77
for directory in usr etc var; do
    mkdir -p "$layers/$directory/upper" "$layers/$directory/work"
    mount -t overlay overlay /$directory 2>/dev/null \
        -o "lowerdir=/$directory,upperdir=$layers/$directory/upper,workdir=$layers/$directory/work" || exit 77
done
for directory in /srv /mnt /home /root; do mount -t tmpfs tmpfs $directory || exit 77; done
# As udev makes it, whatever this machine has.
mknod -m 666 "$layers/fuse" c 10 229 && mount --bind "$layers/fuse" /dev/fuse || exit 77
cd /
unset XDG_STATE_HOME
export HOME=/root LC_ALL=C.UTF-8
exec bash "$2"
