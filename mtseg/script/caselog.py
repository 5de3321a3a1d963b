"""A record of finished cases, a line of JSON each, from which a long job goes on where it was cut off."""

import json
import os
from pathlib import Path

from mtseg.checkpoint import write_whole

FIELDS = {"seconds": (int, float), "rows": list, "files": list}  # of an entry, that inference.py reads


class CaseLogError(ValueError):
    """A record that cannot be read or written; the message is one sentence with the file and the remedy."""


class CaseLog:
    """The file `path`: a first line with the settings, and a line for every finished case.

    `settings`: what the results depend on, as JSON can hold it. `go_on`: go on from the cases in the file, which must
    have been made with the same settings (CaseLogError names the first that differs); otherwise the file begins anew.
    `owner`: a setting in which the file must not differ even then, lest one job replaces the results of another.
    A last line that a crash cut short is dropped. `done`: {case: entry} of the finished cases, in their order.
    """

    def __init__(self, path, settings, go_on, owner=None):
        self.path = Path(path)
        self.done = {}
        settings = json.loads(json.dumps(settings))
        before, finished = self._read(go_on) if self.path.exists() and (go_on or owner) else (None, {})
        if go_on and before is not None:
            self._compare(settings, before, settings.keys() | before.keys(), "restore it, leave out --continue")
            self.done = finished
        elif before is not None and owner in before:
            self._compare(settings, before, [owner], f"remove {self.path.parent}")
        lines = [{"settings": settings}, *({"case": case, **entry} for case, entry in self.done.items())]
        write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())

    def _read(self, strict):
        """(settings, {case: entry}) of the file; (None, {}) where not even its first line was finished, or where it is
        damaged and not `strict`."""
        try:
            text = self.path.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            if not lines:
                return None, {}
            entries = {line.pop("case"): line for line in lines[1:]}
            if not all(isinstance(entry[name], kind) for entry in entries.values() for name, kind in FIELDS.items()):
                raise ValueError("a case has other fields than this version writes")
            return dict(lines[0]["settings"]), entries
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            if strict:
                raise CaseLogError(f"{self.path}: is damaged ({error}); leave out --continue to start anew") from error
            return None, {}

    def _compare(self, settings, before, names, remedy):
        for name in sorted(names):
            if settings.get(name) != before.get(name):
                raise CaseLogError(
                    f"{self.path}: was begun with other settings ({name} is {settings.get(name)} and was "
                    f"{before.get(name)}); {remedy}, or name another --output_dir"
                )

    def add(self, case, entry):
        """Record that `case` is finished, with what is to be known of it (a dict for JSON); on disk on return."""
        self.done[case] = entry
        try:
            with open(self.path, "r+", encoding="utf-8") as file:  # not "a": one that was removed stays so
                file.seek(0, os.SEEK_END)
                file.write(json.dumps({"case": case, **entry}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CaseLogError(
                f"{self.path}: could not be written ({error.strerror or error}); free space and go on with --continue"
            ) from error
