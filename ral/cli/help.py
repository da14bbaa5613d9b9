"""--help and --help-all."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from .parsing import Command, Setting, presets, value_text
from .typed import describe

_INDENT = " " * 4
_BRIEF = 220  # letters


def overview(commands: Iterable[Command], others: dict[str, str]) -> str:
    """The text of `python -m ral --help`.

    Args:
        commands: those that settings belong to.
        others: further commands, name to summary.
    """
    lines = [
        "usage: python -m ral COMMAND [--preset NAME] [--config FILE.yaml] [key=value ...]",
        "",
        "Reinforced Attention Learning and On-Policy Attention Distillation on TRL.",
        "",
        "commands:",
    ]
    known = {**{command.name: command.summary for command in commands}, **others}
    lines += [f"  {name:<15}{summary}" for name, summary in known.items()]
    lines += ["", "presets:"]
    lines += [f"  {name:<15}of {command}" for name, command in presets().items()]
    lines += [
        "",
        "python -m ral COMMAND --help lists the settings of a command. On several processes:",
        "accelerate launch -m ral COMMAND ...",
    ]
    return "\n".join(lines)


def help_text(command: Command, everything: bool) -> str:
    """The settings of a command, grouped.

    Args:
        command: whose.
        everything: with every setting of TRL and transformers.
    """
    own = [name for name, of in presets().items() if of == command.name]
    lines = [
        f"usage: python -m ral {command.name} [--preset NAME] [--config FILE.yaml] [key=value ...]",
        "",
        *_wrapped(command.description, ""),
        "",
        "Settings are given as key=value, --key value or --key=value, in YAML files, or by a preset"
        + (f" ({', '.join(own)})." if own else "."),
        "The command line is stronger than files, files are stronger than presets.",
        "",
        "  --print-config  print the settings as YAML for --config, and stop",
        "  --help          this; --help-all also lists every setting of TRL and transformers"
        if command.trainer_config
        else "  --help          this",
    ]
    for config in command.ours:
        lines += _group(getattr(config, "title", config.__name__), _of(command, config), command)
    if command.trainer_config is None:
        return "\n".join(lines)
    settings = _of(command, command.configs[-1])
    attention = {name: setting for name, setting in settings.items() if setting.is_ours}
    if attention:
        lines += _group("attention", attention, command)
    often = {name: settings[name] for name in command.often}
    lines += _group("training, of TRL", often, command)
    if everything:
        rest = {n: s for n, s in settings.items() if n not in {*attention, *often}}
        lines += _group("everything else of TRL and transformers", rest, command)
    return "\n".join(lines)


def _of(command: Command, owner: type) -> dict[str, Setting]:
    return {name: setting for name, setting in command.known.items() if setting.owner is owner}


def _group(title: str, settings: dict[str, Setting], command: Command) -> list[str]:
    lines = ["", f"{title}:"]
    for name, setting in settings.items():
        default = command.defaults.get(name, setting.default)
        lines.append(f"  {name}  ({describe(setting.hint)}; default {value_text(default)})")
        lines += _wrapped(setting.help if setting.is_ours else _brief(setting.help), _INDENT)
    return lines


def _brief(text: str) -> str:
    """The first sentences, about two lines: TRL's help may fill a page."""
    text = " ".join(text.split()).replace("%%", "%")
    ends = [match.end() for match in re.finditer(r"\.(?= |$)", text)]
    within = [end for end in ends if end <= _BRIEF]
    return text[: within[-1]] if within else text[: ends[0]] if ends else text


def _wrapped(text: str, indent: str) -> Sequence[str]:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent
    )
