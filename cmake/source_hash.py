"""Hash of the sources that the compiled libraries are built from; setup.py keeps it beside them.

python cmake/source_hash.py FOLDER    succeeds where the libraries in FOLDER were built from these sources
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "sources"  # of the hash in build_info.json


def source_hash(root: Path = ROOT) -> str:
    """Return the SHA-256 of names and contents of all files in csrc and cmake, and of CMakeLists.txt."""
    hashed = hashlib.sha256()
    folders = (path for name in ("csrc", "cmake") for path in (root / name).rglob("*"))
    files = [root / "CMakeLists.txt", *(path for path in folders if path.is_file())]
    for path in sorted(path for path in files if path.suffix != ".pyc"):
        contents = path.read_bytes()
        hashed.update(f"{path.relative_to(root).as_posix()}\0{len(contents)}\0".encode() + contents)
    return hashed.hexdigest()


def built_from_these(libraries: Path) -> bool:
    """Return whether build_info.json beside the libraries has the hash of these sources."""
    info = libraries / "build_info.json"
    return info.exists() and json.loads(info.read_text()).get(NAME) == source_hash()


if __name__ == "__main__":
    sys.exit(not built_from_these(Path(sys.argv[1])))
