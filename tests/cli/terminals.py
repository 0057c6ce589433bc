"""`dllm` in a pseudo-terminal of a given size."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

PATIENCE = 300  # seconds until a test that waits for what never comes gives up


class Terminal:
    """A process whose standard streams are a terminal. Use it as a context manager."""

    def __init__(self, *arguments: str, columns: int = 80, lines: int = 24, **environment: str):
        self.shown, self.read_from = "", 0
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        kept = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dllm_kernels", *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=kept | {"TERM": "xterm-256color"} | environment,
        )  # fmt: skip
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        self.write("\x03")

    def wait_for(self, *texts: str) -> None:
        """Wait until one of `texts` is shown behind what was waited for before."""
        until = time.monotonic() + PATIENCE
        while not (
            found := [place for text in texts if (place := self.plain.find(text, self.read_from)) >= 0]
        ):
            assert time.monotonic() < until and self._read(), (
                f"no {texts} in {self.plain[self.read_from :]!r}"
            )
        self.read_from = min(found) + 1

    def ended(self) -> int:
        """Read to the end; return the exit code."""
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    @property
    def plain(self) -> str:
        """What was shown, without escape sequences."""
        return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07)", "", self.shown)

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], PATIENCE)
        if not ready:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other end is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)
