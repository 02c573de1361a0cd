# The package on a machine: installed, read, mounted by fstab as root and as ordinary users, and where it must fail.
# In the environment: DEB, IMAGE (a qcow2 file). Run by tests/installed.rs in a namespace of its own.
set -euo pipefail

fail() { echo "FAILED: $*" >&2; exit 1; }
equal() { [ "$1" = "$2" ] || fail "'$1' is not '$2'"; }
contains() { [[ "$1" == *"$2"* ]] || fail "'$2' is not in: $1"; }
# A command that must fail, with one line that says this.
refused() {
    local words=$1 said
    shift
    if said=$("$@" 2>&1); then fail "succeeded: $*"; fi
    contains "$said" "$words"
    equal "$(grep -c . <<<"$said")" 1
}
# The same as another user.
as() { local user=$1; shift; su "$user" -c "$*"; }
refused_as() { local user=$1 words=$2; shift 2; refused "$words" su "$user" -c "$*"; }
mounted() { findmnt -n "$1" >/dev/null; }
# umount returns before the daemon has ended.
serves() { cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -q "freightfs mount .*$1 "; }
ended() { for _ in $(seq 200); do serves "$1" || return 0; sleep 0.05; done; fail "the daemon of $1 does not end"; }

echo "== the package"
# Images for containers leave the manual out.
rm -f /etc/dpkg/dpkg.cfg.d/*
dpkg -i "$DEB" >/dev/null
for page in $(dpkg -L freightfs | grep /man/man./); do
    [ -n "$(MANWIDTH=80 man --warnings -E UTF-8 -l "$page" 2>/tmp/warnings.$$ | head -c 100)" ] || fail "$page is empty"
    equal "$(cat /tmp/warnings.$$)" ""
done
rm -f /tmp/warnings.$$
bash -n /usr/share/bash-completion/completions/freightfs
equal "$(readlink -f /sbin/mount.freightfs)" /usr/bin/freightfs
if command -v systemd-analyze >/dev/null; then
    mkdir -p /etc/freightfs
    equal "$(systemd-analyze verify --recursive-errors=no freightfs@nightly.service 2>&1)" ""
fi
contains "$(freightfs --version)" "freightfs 0"

useradd -m carol
useradd -m dave
mkdir -p /srv/images /srv/b /srv/carol /mnt/root /mnt/auto /mnt/carol /mnt/other /mnt/full
cp "$IMAGE" /srv/images/web.qcow2
chown carol /srv/carol /mnt/carol /mnt/other
touch /mnt/full/file
cat >>/etc/fstab <<FSTAB
/srv/images /mnt/root freightfs noauto,_netdev,x-systemd.automount,nofail,allow_other,uid=$(id -u carol),gid=$(id -g carol),umask=027,bucket=b=file:///srv/b 0 0
/srv/images /mnt/auto freightfs nofail,formats=raw:qcow2 0 0
/srv/images /mnt/carol freightfs noauto,user,bucket=b=file:///srv/carol 0 0
/srv/images /mnt/other freightfs noauto,user,allow_other,state=/home/carol/other 0 0
FSTAB

echo "== by fstab, as root"
mount /mnt/root
equal "$(findmnt -n -o FSTYPE,SOURCE /mnt/root)" "fuse.freightfs /srv/images"
contains "$(grep ' /mnt/root ' /proc/mounts)" "nosuid,nodev"
equal "$(stat -c '%U %G %a' /mnt/root/images/web/web.raw)" "carol carol 640"
equal "$(stat -c '%U %a' /mnt/root/images)" "carol 750"
contains "$(df --output=target /mnt/root)" /mnt/root
as carol 'head -c 1M /mnt/root/images/web/web.raw >/dev/null'
as carol 'cp /mnt/root/images/web/web.vhd /mnt/root/buckets/b/ && freightfs wait -q /mnt/root/buckets/b/web.vhd'
qemu-img compare -f qcow2 -F vpc "$IMAGE" /srv/b/web.vhd >/dev/null
refused_as dave 'Permission denied' 'ls /mnt/root'
refused 'mounted here already' mount.freightfs /srv/images /mnt/root
umount /mnt/root
if mounted /mnt/root; then fail "still mounted"; fi
ended /mnt/root
# All that is not noauto; again, there is nothing to do.
mount -a -t freightfs
mounted /mnt/auto
mount -a -t freightfs
equal "$(grep -c ' /mnt/auto ' /proc/mounts)" 1
equal "$(ls /mnt/auto/images/web)" "image.json
web.qcow2
web.raw"
umount /mnt/auto
ended /mnt/auto
mount -t freightfs -o ro,bucket=b=file:///srv/b /srv/images /mnt/root
refused 'Read-only file system' touch /mnt/root/buckets/b/new
umount /mnt/root
ended /mnt/root

echo "== by fstab, as an ordinary user"
as carol 'mount /mnt/carol'
equal "$(as carol 'stat -c "%U %a" /mnt/carol/images/web/web.raw')" "carol 644"
as carol 'cp /mnt/carol/images/web/web.vmdk /mnt/carol/buckets/b/ && freightfs wait -q /mnt/carol/buckets/b/web.vmdk'
contains "$(as carol 'freightfs jobs --all /mnt/carol')" web.vmdk
equal "$(stat -c %U /srv/carol/web.vmdk)" carol
# Without allow_other nobody else enters, not even root.
refused 'Permission denied' ls /mnt/carol
refused_as dave 'Permission denied' 'ls /mnt/carol'
refused_as dave 'umount' 'umount /mnt/carol'
# Not the program that looks for it.
daemon() { grep -la -e "--report-read[y].*$1" /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3; }
contains "$(cat "/proc/$(daemon /mnt/carol)/status")" "NoNewPrivs:	1"
as carol 'umount /mnt/carol'
ended /mnt/carol
# What it no longer may itself, the process beside it does with fusermount3.
as carol 'mount /mnt/carol'
as carol "kill $(daemon /mnt/carol)"
ended /mnt/carol
if mounted /mnt/carol; then fail "still mounted after a signal"; fi
mkdir /srv/dave /srv/dave/state
mount -t freightfs -o user=dave,allow_other,state=/srv/dave/state/root /srv/images /mnt/root
equal "$(stat -c %U /mnt/root/images /srv/dave/state/root/log)" "dave
dave"
umount /mnt/root
ended /mnt/root
refused_as carol 'only root can mount for the user' 'freightfs mount -o user=dave /srv/images /mnt/carol'
equal "$(stat -c %a /home/carol/.local/state/freightfs/*)" 700
sed -i 's/^user_allow_other/#&/' /etc/fuse.conf
refused_as carol 'user_allow_other' 'mount /mnt/other'
echo user_allow_other >>/etc/fuse.conf
as carol 'mount /mnt/other'
as dave 'head -c 1M /mnt/other/images/web/web.raw >/dev/null'
as carol 'umount /mnt/other'
ended /mnt/other

echo "== what must fail, with one line that says what to do"
refused '"colour"' mount -t freightfs -o colour=red /srv/images /mnt/root
refused '/srv/nothing' mount -t freightfs /srv/nothing /mnt/root
refused 'mkdir /mnt/nothing' freightfs mount /srv/images /mnt/nothing
refused 'not empty' freightfs mount /srv/images /mnt/full
refused 'not a directory' freightfs mount /srv/images /mnt/full/file
refused 'ftp' freightfs mount /srv/images /mnt/root --bucket b=ftp://x
refused 'ESC' freightfs mount /srv/images /mnt/root --bucket "b=$(printf 'file:///srv/ESC')"
refused 'AWS_ACCESS_KEY_ID' freightfs mount /srv/images /mnt/root --bucket b=s3://key:secret@b
freightfs mount /srv/images /mnt/root --state /srv/state
refused '/srv/state' freightfs mount /srv/images /mnt/auto --state /srv/state
kill -KILL "$(cat /srv/state/lock)"
# A daemon that was killed: the mount is gone, or the next one says how to remove it.
for _ in $(seq 100); do ls /mnt/root >/dev/null 2>&1 && ! mounted /mnt/root && break; sleep 0.05; done
if mounted /mnt/root; then
    refused 'fusermount3 -u' freightfs mount /srv/images /mnt/root --state /srv/state
    umount -l /mnt/root
fi
freightfs mount /srv/images /mnt/root --state /srv/state
umount /mnt/root
ended /mnt/root
rm /usr/bin/fusermount3
refused_as carol 'install the package fuse3' 'freightfs mount /srv/images /mnt/carol'
chmod 600 /dev/fuse
refused_as carol '/dev/fuse' 'freightfs mount /srv/images /mnt/carol' || { chmod 666 /dev/fuse; exit 1; }
chmod 666 /dev/fuse
mount -t tmpfs tmpfs /dev
for node in "null 1 3" "zero 1 5" "urandom 1 9"; do read -r name major minor <<<"$node"; mknod -m 666 "/dev/$name" c "$major" "$minor"; done
refused 'modprobe fuse' freightfs mount /srv/images /mnt/root
umount /dev
if grep fuse.freightfs /proc/mounts; then fail "something is left mounted"; fi
dpkg -r freightfs >/dev/null
echo "== all is well"
