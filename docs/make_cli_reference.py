"""Prints docs/cli.md from the commands themselves, so that the reference cannot drift from `--help`.

python docs/make_cli_reference.py > docs/cli.md
"""

import runpy
from pathlib import Path

import typer

import cli

HEAD = """# Command line reference

Made by `python docs/make_cli_reference.py` from the commands themselves; a test keeps it current.

Results go to stdout, progress and messages to stderr. Bad input is one line on stderr and exit code 1
(2 for wrong usage); `anneal --debug ...` shows the traceback. `python -m cli` is the same as `anneal`.
"""


def spelt(argument: typer.core.TyperArgument) -> str:
    """As a usage line has it: brackets around what may be left out, dots behind what may be repeated."""
    name = str(argument.metavar) if argument.required else f"[{argument.metavar}]"
    return name if argument.nargs == 1 else f"{name}..."


def describe(name: str, command: typer.core.TyperCommand) -> str:
    """One section: purpose, arguments, options with defaults."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(map(spelt, arguments))
    lines = [f"## anneal {name}", "", (command.help or "").strip(), "", "```"]
    lines += [f"anneal {name} {usage} [OPTIONS]".replace("  ", " "), "```", ""]
    for parameter in arguments:
        lines.append(f"- `{spelt(parameter)}` {parameter.help}")
    for parameter in options:
        word = parameter.opts[0]
        if not getattr(parameter, "is_flag", False):
            word += f" {parameter.metavar or word.lstrip('-').replace('-', '_').upper()}"
        text = " ".join((parameter.help or "").split())
        nothing = parameter.default is None or parameter.default is False
        if getattr(parameter, "show_default", False) and not nothing:
            text += f" Default: {parameter.default}."
        lines.append(f"- `{word}`{' (required)' if parameter.required else ''} {text}")
    return "\n".join(lines)


def main() -> None:
    sections = [HEAD.rstrip()]
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for child, leaf in getattr(command, "commands", {"": command}).items():
            sections.append(describe(f"{name} {child}".strip(), leaf))
    wrap_page = runpy.run_path(str(Path(__file__).with_name("wrap_pages.py")))["wrap_page"]
    print(wrap_page("\n\n".join(sections)), end="")


if __name__ == "__main__":
    main()
