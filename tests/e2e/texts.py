"""Prompts for the end-to-end tests: real prose that every Debian machine has."""

import pathlib

LICENSES = pathlib.Path("/usr/share/common-licenses")


def prose(n_chars, start=0):
    """n_chars characters of GPL-3 and what follows it; `start` gives prompts that share no beginning."""
    text = "".join((LICENSES / name).read_text() for name in ("GPL-3", "Apache-2.0", "MPL-2.0"))
    if start + n_chars > len(text):
        raise ValueError(f"only {len(text)} characters of prose")
    return text[start:start + n_chars]


SHORT = "Everyone is permitted to copy and distribute"
LONG = prose(9000)  # about 2,000 tokens of the demo model
