"""What a flag takes: argparse types, whose message says what is wrong with the text that was given."""

import argparse
import math


def checked(kind, allowed, problem):
    """An argparse type: the `kind` (int or float) of a text where `allowed` is true of it; else '<text> <problem>'."""

    def value(text):
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        if not allowed(number):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return number

    value.kind = kind
    return value


def within(limit):
    return checked(float, lambda number: 0 <= number <= limit, f"is not between 0 and {limit}")


NOT_HALVED = "is not a positive multiple of 16, and the networks halve a patch four times"

positive = checked(int, lambda number: number >= 1, "is below 1")
natural = checked(int, lambda number: number >= 0, "is negative")
even = checked(int, lambda number: number >= 1 and number % 2 == 0, "is not even and above 0")
classes = checked(int, lambda number: 2 <= number <= 256, "is not between 2 and 256 (background is a class)")
patch_side = checked(int, lambda number: number >= 1 and number % 16 == 0, NOT_HALVED)
rate = checked(float, lambda number: 0 <= number < math.inf, "is not a finite number of at least 0")
fraction = within(1)
positive_fraction = checked(float, lambda number: 0 < number <= 1, "is not above 0 and at most 1")
below_one = checked(float, lambda number: 0 <= number < 1, "is not below 1 and at least 0")
