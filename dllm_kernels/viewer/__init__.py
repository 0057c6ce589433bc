"""Pictures of a canvas that fills in: live in a terminal, and as a page to replay.

`terminal.py` draws while `dk.sample` or `dk.infill` runs, `replay.py` writes what a run recorded.
"""

COLOURS = ("step", "confidence")  # what the colour of a token may tell
