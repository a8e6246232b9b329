"""What tests read from README.md."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command_line() -> str:
    """The block of commands, which apps/test_silence.py runs in a process of its own."""
    return re.search(r"## Command line.*?```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)[1]
