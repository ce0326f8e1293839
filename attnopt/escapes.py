"""Control characters, which a terminal obeys, as text: names in files and messages may hold them."""

from __future__ import annotations

import re

# C0 but the ends of lines and tabs, DEL and C1; and surrogates, which no encoding can hold.
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The same with each of them as Python writes it: ``\x1b``, ``\r``, ``\ud800``."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
