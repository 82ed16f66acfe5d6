"""Ranges of settings, in the notation of intervals: "[0, 1)" holds 0 and not 1."""

from mechatlas.base import RecipeError

SEED = f"[0, {2**32 - 1}]"
COUNT, COUNT_OR_NONE = "[1, 1000000000]", "[0, 1000000000]"
"""Numbers of things that fit in memory or on a disk, which are never more."""
POSITIVE = "(0, 1e12]"
"""Weights, thresholds and temperatures."""
SHARE, RATE = "[0, 1]", "(0, 1)"


def check_ranges(settings: object, **ranges: str) -> None:
    """Refuse a setting outside its range, or that is not a number.

    None, the value of a setting that is left out, is in every range; of a tuple every entry is
    looked at.

    Args:
        settings: Object with the settings as attributes.
        ranges: Range of each setting, as an interval.

    Raises:
        RecipeError: A setting is outside; names it, its value and the range.
    """
    for name, interval in ranges.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (expected := _breach(number, interval)):
                raise RecipeError(f"{name} must be {expected}, got {number}.")


def _breach(number: int | float, interval: str) -> str:
    """Say in words what a number would have to be; empty where it is in the interval."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number > low or (interval[0] == "[" and number == low)
    below = number < high or (interval[-1] == "]" and number == high)
    if above and below:
        return ""
    if high <= 1:
        return f"in {interval}"
    low_text, high_text = (bound.strip() for bound in interval[1:-1].split(","))
    if not above:
        return f"at least {low_text}" if interval[0] == "[" else f"> {low_text}"
    return f"at most {high_text}" if interval[-1] == "]" else f"< {high_text}"
