"""A record of finished cases, a line of JSON each, from which a long job goes on where it was cut off."""

import json
import os
from pathlib import Path


class CaseLogError(ValueError):
    """A record that cannot be gone on with or written; the message is one sentence with the file and the remedy."""


class CaseLog:
    """The file `path`: a first line with the settings, and a line for every finished case.

    `settings`: what the results depend on, as JSON can hold it. `keep`: go on with the cases in the file, which must
    have been made with the same settings (CaseLogError names the first that differs); otherwise the file begins anew.
    `owner`: a setting in which the file must not differ even then, lest one job replaces the results of another.
    A last line that a crash cut short is dropped. `done`: {case: entry} of the finished cases, in their order.
    """

    def __init__(self, path, settings, keep, owner=None):
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        there = None
        if self.path.exists() and (keep or owner):
            try:
                there = self._read()
            except CaseLogError:
                if keep:
                    raise
        if there and keep:
            self._compare(settings, there[0], settings.keys() | there[0].keys(), "restore it, leave out --continue")
        elif there and owner in there[0]:
            self._compare(settings, there[0], [owner], f"remove {self.path.parent}")
        self.done = there[1] if there and keep else {}
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        lines = [{"settings": settings}, *({"case": case, **entry} for case, entry in self.done.items())]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise self._failure(error) from error

    def _read(self):
        """(settings, done) of the file; None where not even its first line was finished."""
        try:
            text = self.path.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            return (lines[0]["settings"], {line.pop("case"): line for line in lines[1:]}) if lines else None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CaseLogError(f"{self.path}: is damaged ({error}); leave out --continue to start anew") from error

    def _compare(self, settings, then, names, remedy):
        for name in sorted(names):
            if settings.get(name) != then.get(name):
                raise CaseLogError(
                    f"{self.path}: was begun with other settings ({name} is {settings.get(name)} and was "
                    f"{then.get(name)}); {remedy}, or name another --output_dir"
                )

    def add(self, case, entry):
        """Record that `case` is finished, with what there is to know of it (a dict for JSON); on disk on return."""
        self.done[case] = entry
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"case": case, **entry}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error):
        why = error.strerror or error
        return CaseLogError(f"{self.path}: could not be written ({why}); free space there and go on with --continue")
