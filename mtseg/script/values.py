"""What a flag takes: argparse types, whose message says what is wrong with the text that was given."""

import argparse
import math


def checked(name, kind, allowed, problem):
    """An argparse type: the `kind` (int or float) of a text where `allowed` is true of it; else '<text> <problem>'."""

    def value(text):
        number = kind(text)
        if not allowed(number):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return number

    value.__name__ = name  # argparse's word for a text that is no number: 'invalid <name> value'
    value.kind = kind
    return value


def within(limit):
    return checked("number", float, lambda number: 0 <= number <= limit, f"is not between 0 and {limit}")


NOT_HALVED = "is not a positive multiple of 16, and the networks halve a patch four times"

positive = checked("positive", int, lambda number: number >= 1, "is below 1")
natural = checked("natural", int, lambda number: number >= 0, "is negative")
even = checked("even", int, lambda number: number >= 1 and number % 2 == 0, "is not even and above 0")
classes = checked("classes", int, lambda number: 2 <= number <= 256, "is not between 2 and 256 (background is a class)")
patch_side = checked("patch_side", int, lambda number: number >= 1 and number % 16 == 0, NOT_HALVED)
rate = checked("rate", float, lambda number: 0 <= number < math.inf, "is not a finite number of at least 0")
fraction = within(1)
below_one = checked("below_one", float, lambda number: 0 <= number < 1, "is not below 1 and at least 0")
