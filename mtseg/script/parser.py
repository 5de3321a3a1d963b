"""A parser of flags with a page of help, and errors of one line."""

import argparse
import contextlib
import difflib
import shutil
import sys


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with values and default behind each flag; without `everything`, only the flags that people often set."""

    def __init__(self, prog, everything=True):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size((120, 24)).columns, 120))
        self.everything = everything

    def add_argument(self, action):
        if self.everything or not getattr(action, "rare", False):
            super().add_argument(action)

    def _get_default_metavar_for_optional(self, action):
        return "N" if getattr(action.type, "kind", action.type) is int else "X"

    def _metavar_formatter(self, action, default_metavar):
        metavar = action.metavar or ("X" if action.choices else default_metavar)
        return lambda size: metavar if isinstance(metavar, tuple) else (metavar,) * size

    def _get_help_string(self, action):
        text = action.help + (": " + ", ".join(map(str, action.choices)) if action.choices else "")
        if action.default in (None, False, argparse.SUPPRESS) or "(default: " in text:
            return text
        default = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        return f"{text} (default: {' '.join(map(str, default))})".replace("%", "%%")


class Help(argparse.Action):
    """--help shows the flags that people often set, --help all every one."""

    def __call__(self, parser, namespace, value, option_string=None):
        parser.everything = value == "all" or not parser.has_rare
        print(parser.format_help(), end="")
        raise SystemExit(0)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with a page of help, `--help all` for the rest, and errors of one line.

    `group(title)` gives two functions that add a flag: for those that people often set, and for those they rarely do.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, add_help=False, **kwargs)
        self.noted = set()  # flags that were given twice, each of which is said once
        self.everything = True
        self.has_rare = False
        self.method_first = False  # whether a new group stands before the others in the help
        what = "this page; `--help all` shows every flag"
        self.add_argument("-h", "--help", nargs="?", metavar="all", action=Help, default=argparse.SUPPRESS, help=what)

    def group(self, title):
        add = self.add_argument_group(title).add_argument
        if self.method_first:
            self._action_groups.insert(2, self._action_groups.pop())

        def rare(*names, **settings):
            add(*names, **settings).rare = self.has_rare = True

        return add, rare

    def _get_formatter(self):
        return self.formatter_class(prog=self.prog, everything=self.everything)

    @contextlib.contextmanager
    def errors_as(self, make):
        """A context in which a wrong flag raises `make(message)` instead of ending the process."""
        before, self.make_error = self.make_error, make
        try:
            yield
        finally:
            self.make_error = before

    make_error = None

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but a flag that is given twice is said, and an error where it takes a list of values."""
        words = sys.argv[1:] if args is None else [str(word) for word in args]
        seen = {}
        for option in (word.partition("=")[0] for word in words):
            action = self._option_string_actions.get(option)
            if action is not None and action.nargs == argparse.REMAINDER:
                break  # what follows are another script's flags
            if action in seen and action.nargs == "+":
                self.error(f"{option} is given twice, and only the last would count; give all values behind one")
            if action in seen and action not in self.noted:
                self.noted.add(action)
                given = (
                    f"{option} is given twice"
                    if seen[action] == option
                    else f"{seen[action]} and {option} are both given"
                )
                print(f"note: {given}; the last one counts", file=sys.stderr)
            if action is not None and not isinstance(action, argparse._ExtendAction):
                seen[action] = option
        return super().parse_known_args(words, namespace)

    def _remedy(self, unknown):
        """What to do about the flag `unknown`, which this script has not; '' where nothing is like it."""
        from mtseg.script import methods  # here, as its scripts need this module

        flag = f"--{unknown.lstrip('-')}"
        if flag not in self._option_string_actions and (scripts := methods.scripts_with(flag)):
            return f"; {flag} is a flag of {', '.join(scripts)}"
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def error(self, message):
        if self.make_error is not None:
            raise self.make_error(message)
        if message.startswith("unrecognized arguments: -"):
            message += self._remedy(message.split()[2].partition("=")[0])
        elif message.startswith("unrecognized arguments: ") and self._get_positional_actions():
            message += "; what belongs to no flag stands before all flags"
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def given_flags(parser, argv):
    """{name: value} of the flags that stand in `argv`."""
    absent = object()
    names = {action.dest: absent for action in parser._actions if action.dest != "help" and not action.required}
    values = vars(parser.parse_args(argv, argparse.Namespace(**names)))
    return {name: value for name, value in values.items() if value is not absent}


def defaults_of(parser):
    """{name: default} of all flags of `parser`."""
    return {action.dest: parser.get_default(action.dest) for action in parser._actions if action.dest != "help"}
