"""Text of a model or a file, made fit to be shown: a terminal obeys the control characters that it gets."""

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str) -> str:
    """Return `text` with control and direction characters written out (\\x1b), tabs and line ends kept."""
    return _CONTROL.sub(lambda found: _written_out(ord(found[0])), text.replace("\r\n", "\n"))


def _written_out(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
