"""Phrases that the messages of several tools share."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], before: str = "", after: str = "", cutoff: float = 0.6) -> str:
    """ "did you mean X?" between `before` and `after`, X being the known word most like this one; "" without any.

    cutoff: how alike they must be, in [0, 1].
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"{before}did you mean {close[0]}?{after}" if close else ""


def list_some(names: Iterable[str]) -> str:
    """The first five of the sorted names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def count_of(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
