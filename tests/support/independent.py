"""Reads an image with libraries that have no code in common with freightfs, and compares it with the raw disk.

Usage: independent.py FORMAT IMAGE RAW, where FORMAT is a suffix as freightfs names it.
"""

import sys

from dissect.hypervisor.disk import qcow2, vdi, vhd, vhdx, vmdk
from oslo_utils.imageutils import format_inspector

CHUNK = 1 << 20

READERS = {
    "qcow2": lambda path: qcow2.QCow2(open(path, "rb")).open(),
    "zlib.qcow2": lambda path: qcow2.QCow2(open(path, "rb")).open(),
    "zstd.qcow2": lambda path: qcow2.QCow2(open(path, "rb")).open(),
    "vhd": lambda path: vhd.VHD(open(path, "rb")),
    "fixed.vhd": lambda path: vhd.VHD(open(path, "rb")),
    "vhdx": lambda path: vhdx.VHDX(open(path, "rb")),
    "vmdk": lambda path: vmdk.VMDK(open(path, "rb")),
    "stream.vmdk": lambda path: vmdk.VMDK(open(path, "rb")),
    "vdi": lambda path: vdi.VDI(open(path, "rb")).open(),
}

# What the inspector that guards OpenStack's uploads says of each.
INSPECTED = {
    "qcow2": "qcow2",
    "zlib.qcow2": "qcow2",
    "zstd.qcow2": "qcow2",
    "vhd": "vhd",
    "fixed.vhd": "raw",
    "vhdx": "vhdx",
    "vmdk": "vmdk",
    "stream.vmdk": "vmdk",
    "vdi": "vdi",
    "zvhd": "raw",
    "zvhd2": "raw",
    "raw": "raw",
}


def compare(suffix, image, raw):
    disk, at = READERS[suffix](image), 0
    end = disk.size
    if suffix.endswith("vmdk"):
        # dissect fails at the end of any VMDK, qemu-img's too, whose size is no multiple of its own buffer.
        end -= end % 8192
    with open(raw, "rb") as expected:
        while chunk := expected.read(min(CHUNK, max(end - at, 0))):
            # In pieces: some readers give all that is asked for at once only within a block.
            disk.seek(at)
            got = disk.read(len(chunk))
            if got != chunk:
                sys.exit(f"dissect reads other bytes in the MiB at {at} of {image}")
            at += len(chunk)


def inspect(suffix, image):
    inspector = format_inspector.detect_file_format(image)
    if str(inspector) != INSPECTED[suffix]:
        sys.exit(f"the inspector takes {image} for {inspector}, not {INSPECTED[suffix]}")
    inspector.safety_check()


if __name__ == "__main__":
    suffix, image, raw = sys.argv[1:]
    inspect(suffix, image)
    if suffix in READERS:
        compare(suffix, image, raw)
