"""Links in model folders from elsewhere. Standard library only.

What is read from a folder goes into the folders made of it, and from there often to other people. So a link in a
downloaded folder could publish any file of this machine. Links are therefore followed only inside the folder, and from
a snapshot of the hub client's cache to that model's `blobs`, where it keeps the files themselves:

    models--OWNER--NAME/snapshots/REVISION/config.json -> ../../blobs/DIGEST

A hard link cannot be distinguished from the file itself; for it, and for all files, what is copied is first parsed.
"""

from __future__ import annotations

import os
from pathlib import Path

from training.errors import InputError

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def check_links(folder: Path) -> None:
    """Raise InputError for a file of a model folder that is a link out of it. Its subfolders are not read."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_symlink())
    for name in names:
        if not (folder / name).is_dir():
            check_link(folder, name)


def check_link(folder: Path, name: str) -> None:
    """Raise InputError when a file of a folder lies outside it, by a link anywhere on the way."""
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is a circular link: put the file itself there") from error
    if home not in real.parents and real.parent not in blobs(home):
        raise InputError(
            f"{path} is a link to {os.readlink(path) if path.is_symlink() else real}, outside its folder, which is not "
            "followed: if you trust it, put the file itself there (`cp -RL` copies a folder without links)"
        )


def blobs(folder: Path) -> list[Path]:
    """Where the links of a snapshot may lead; none for other folders. `folder` and so `blobs` itself are no links."""
    return [above.parent / BLOBS for above in (folder, *folder.parents) if above.name == SNAPSHOTS]
