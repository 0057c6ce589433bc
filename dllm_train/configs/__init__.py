"""Configurations for `accelerate launch --config_file`: ddp, fsdp2, zero1, zero2, zero3 and cpu."""

from pathlib import Path

NAMES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "cpu")


def config_path(name: str) -> Path:
    """Return the file of a configuration, wherever the package is installed; ValueError for other names."""
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(NAMES)}")
    return Path(__file__).with_name(f"{name}.yaml")
