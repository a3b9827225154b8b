# SPDX-License-Identifier: Apache-2.0
"""The files that belong to the project, tracked by git or about to be."""
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files(*suffixes):
    """Paths below ROOT, all or those with one of these suffixes, sorted."""
    # safe.directory: ./test may run as root in a checkout that belongs to somebody else.
    listed = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others",
                             "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # unpacked from an archive
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not name.parts[0].startswith(("build", ".git"))]
    return sorted(name for name in set(names)
                  if (ROOT / name).is_file() and (not suffixes or name.suffix in suffixes))


def is_script(path):
    """Whether a file without a suffix is a script, by its first line."""
    if path.suffix:
        return False
    with open(ROOT / path, "rb") as file:
        return file.read(2) == b"#!"


def first_line(path):
    with open(ROOT / path, errors="replace") as file:
        return file.readline()
