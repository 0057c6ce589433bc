"""The folder that a checkpoint is written to."""

from __future__ import annotations

from pathlib import Path


def free_target(source: object, target: object, overwrite: bool, name: str = "source") -> Path:
    """Return the path of `target`; an error if it is in use, or is the source itself.

    name: the caller's name of the source.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"{name} is a {type(source).__name__}; give a folder, a hub name or a file")
    if not isinstance(target, str | Path) or target == "":
        raise TypeError(f"target is {target!r:.80}; give the path of a folder")
    place, origin = Path(target).expanduser().resolve(), Path(source).expanduser().resolve()
    if place == origin or (origin.is_file() and place == origin.parent):
        raise ValueError(f"target is {place}, where the {name} is; give another folder")
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"target is {place}, which is a file")
    if not overwrite and place.exists() and any(place.iterdir()):
        raise FileExistsError(f"target is {place}, which is not empty; overwrite=True replaces a checkpoint")
    return place
