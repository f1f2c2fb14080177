"""What is known about the disk of a path before anything is written there."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

NETWORK: tuple[str, ...] = (
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "davfs",
    "gfs2",
    "glusterfs",
    "gpfs",
    "lustre",
)
NETWORK += ("nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "wekafs")
FUSE = "fuse."  # sshfs, s3fs, gcsfuse, juicefs, glusterfs … reach over a network, but for these:
LOCAL_FUSE = ("bindfs", "encfs", "exfat", "fuse-overlayfs", "gocryptfs", "lxcfs", "mergerfs", "ntfs", "ntfs-3g", "zfs")


def network_file_system(path: Path) -> str | None:
    """The type of the network file system that a path is, or would be, on; None: a local one, or not known."""
    folder = _existing(path).resolve()
    kind, depth = "", -1
    for mount in psutil.disk_partitions(all=True):  # in order: a later one lies above an earlier one at the same point
        point = Path(mount.mountpoint)
        if folder.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = mount.fstype, len(point.parts)
    is_network = kind in NETWORK or (kind.startswith(FUSE) and kind.removeprefix(FUSE) not in LOCAL_FUSE)
    return kind if is_network else None


def same_disk(one: Path, other: Path) -> bool:
    """Whether two paths are, or would be, on one file system."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def writable(path: Path) -> bool:
    """Whether this user may write a file, or make files in a folder, or make the folder."""
    there = _existing(path)
    return os.access(there, os.W_OK | os.X_OK if there.is_dir() else os.W_OK)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
