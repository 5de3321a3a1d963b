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


def per_axis(kind):
    """An argparse type: '3' as 3, and '3,3,1', a number for each axis, as [3, 3, 1], each as `kind` takes it."""

    def value(text):
        numbers = [kind(number) for number in text.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]

    return value


positive = checked(int, lambda number: number >= 1, "is below 1")
natural = checked(int, lambda number: number >= 0, "is negative")
odd = checked(int, lambda number: number >= 1 and number % 2 == 1, "is not odd and above 0")
even = checked(int, lambda number: number >= 1 and number % 2 == 0, "is not even and above 0")
classes = checked(int, lambda number: 2 <= number <= 255, "is not between 2 and 255 (background is a class)")
rate = checked(float, lambda number: 0 <= number < math.inf, "is not a finite number of at least 0")
fraction = within(1)
positive_fraction = checked(float, lambda number: 0 < number <= 1, "is not above 0 and at most 1")
below_one = checked(float, lambda number: 0 <= number < 1, "is not below 1 and at least 0")
