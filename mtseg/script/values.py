"""What a flag takes: argparse types, whose message says what is wrong with the text that was given."""

import argparse


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def natural(text):
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def even(text):
    number = positive(text)
    if number % 2:
        raise argparse.ArgumentTypeError(f"{text} is not even")
    return number


def classes(text):
    number = int(text)
    if not 2 <= number <= 256:
        raise argparse.ArgumentTypeError(f"{text} is not between 2 and 256 (background is a class)")
    return number


def patch_side(text):
    number = positive(text)
    if number % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16, and the networks halve a patch four times")
    return number


def rate(text):
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return number


def fraction(text):
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def below_one(text):
    number = fraction(text)
    if number == 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return number


def within(limit):
    def bounded(text):
        number = rate(text)
        if number > limit:
            raise argparse.ArgumentTypeError(f"{text} is above {limit}")
        return number

    return bounded
