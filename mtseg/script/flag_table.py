"""Write docs/flags.md, the table of all flags, from the parsers of the scripts themselves.

python -m mtseg.script.flag_table
"""

from mtseg.script import flags, methods
from mtseg.script.config import FAST_DECIDES

HEAD = """# Flags

Written by `python -m mtseg.script.flag_table`; do not edit. `--help` shows the flags in bold, `--help all` every one.
A JSON file with any of them is given by `--config`; the command line wins. A run's own `config.json` is such a file.

Where no flag and no file says otherwise, images are trained with {images};
{built_in}.
"""


def shown(action):
    """A flag's default, as Markdown."""
    default = action.default
    if action.dest in FAST_DECIDES:
        return "as `--fast`"
    if default is None:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, (list, tuple)) else default}`"


def words(settings):
    """Settings as flags, in Markdown."""
    values = {name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()}
    return ", ".join(f"`--{name} {value}`" for name, value in values.items())


def table(parser, passed_over=()):
    """The flags of `parser` as Markdown, a table a group, without those whose (name, default) is `passed_over`."""
    lines = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help" and (a.dest, shown(a)) not in passed_over]
        if actions:
            title = "" if group.title in ("options", "positional arguments") else group.title
            lines += ["", f"| {title} | default | what |", "|---|---|---|"]
        for action in actions:
            name = f"`{action.option_strings[0] if action.option_strings else action.dest}`"
            name = name if getattr(action, "rare", False) else f"**{name}**"
            values = "" if action.choices is None else ": " + ", ".join(f"`{choice}`" for choice in action.choices)
            text = action.help.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {name} | {shown(action)} | {text}{values} |")
    return "\n".join(lines)


def page():
    """The text of docs/flags.md: the flags of Mean Teacher, what other scripts have besides, those of inference.py."""
    scripts = methods.scripts_with_runs()
    first = next(path for path in scripts if path.name == "train_mean_teacher.py")
    parser = methods.parser_of(first)
    built_in = ";\n".join(f"the built-in {name} with {words(settings)}" for name, settings in flags.BUILT_IN.items())
    head = HEAD.format(images=words(flags.IMAGE_SETTINGS), built_in=built_in)
    text = f"{head}\n## {first.name}\n{table(parser)}\n"
    known = {(action.dest, shown(action)) for action in parser._actions}
    for path in scripts:
        others = table(methods.parser_of(path), known)
        if path != first:
            name = path.relative_to(flags.HOME)
            text += f"\n## {name}\n\nOf its flags, these are its own or have other defaults than above:\n{others}\n"
    inference = methods.parser_of(flags.HOME / "inference.py")
    return text + f"\n## inference.py\n{table(inference)}\n"


if __name__ == "__main__":
    (flags.HOME / "docs/flags.md").write_text(page(), encoding="utf-8")
