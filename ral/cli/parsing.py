"""From words of the shell to settings: presets, YAML files, overrides. Later ones win."""

from __future__ import annotations

import difflib
import pkgutil
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .errors import Refused
from .guesses import RENAMED, meant
from .typed import is_bool, read_yaml, typed

SWITCHES = ("help", "help_all", "print_config")
_COMMAND = "command"  # the key of a YAML file that says which command it is for


@dataclass(frozen=True)
class Command:
    """A command of the program and its settings.

    Attributes:
        name: at the shell.
        summary, description: for --help.
        ours: dataclasses of our own settings, in the order of --help.
        function: "module:name", imported when needed: takes `Settings`, returns the exit status.
        trainer_config: "module:name" of the dataclass of TRL whose fields are settings too.
        defaults: values that differ from the dataclasses' own.
        often: TRL's settings that --help shows.
    """

    name: str
    summary: str
    description: str
    ours: tuple[type, ...]
    function: str
    trainer_config: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    often: tuple[str, ...] = ()

    @property
    def configs(self) -> list[type]:
        """The dataclasses of its settings, TRL's last."""
        trainer = self.trainer_config and pkgutil.resolve_name(self.trainer_config)
        return [*self.ours, *([trainer] if trainer else [])]

    @cached_property
    def known(self) -> dict[str, Setting]:
        """Every setting by its name."""
        found: dict[str, Setting] = {}
        for config in self.configs:
            hints = typing.get_type_hints(config)
            for entry in fields(config):
                if not entry.init:
                    continue
                if entry.name in found:
                    raise AssertionError(f"two settings are called {entry.name}")
                found[entry.name] = Setting(entry, hints[entry.name], config)
        return found


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass as a setting."""

    field: Any
    hint: Any
    owner: type

    @property
    def default(self) -> Any:
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return None if self.field.default is MISSING else self.field.default

    @property
    def help(self) -> str:
        return str(self.field.metadata.get("help", ""))

    @property
    def is_ours(self) -> bool:
        """Whether it is declared in this package, and not inherited from TRL."""
        named = vars(self.owner).get("__annotations__", {})
        return self.owner.__module__.startswith("ral.") and self.field.name in named


@dataclass
class Settings:
    """The settings given for a command, and their sources.

    Attributes:
        command: which command.
        values: name to value; only what differs from the defaults of the dataclasses, or was given.
        sources: name to "preset digits", "run.yaml" or "the command line".
        preset: the last preset, for the name of the output folder.
        switches: those of SWITCHES that were given.
    """

    command: Command
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    switches: frozenset[str] = frozenset()

    def of(self, config: type) -> dict[str, Any]:
        """The values that are fields of a dataclass."""
        names = {entry.name for entry in fields(config)}
        return {name: value for name, value in self.values.items() if name in names}

    def build(self, config: type) -> Any:
        """An object of one of our dataclasses.

        Raises:
            Refused: it does not take a value.
        """
        try:
            return config(**self.of(config))
        except ValueError as error:
            raise Refused(str(error)) from error

    def as_yaml(self) -> str:
        """All our settings and the given ones of TRL, in the form that --config reads."""
        shown: dict[str, Any] = {_COMMAND: self.command.name}
        for name, setting in self.command.known.items():
            if setting.is_ours or name in self.values:
                shown[name] = self.values.get(name, setting.default)
        return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=10_000))


def parse(command: Command, words: Sequence[str]) -> Settings:
    """Read the words after a command.

    `--preset NAME` and `--config FILE` come first in the order given, then `key=value`,
    `--key=value` and `--key value`; dashes in names mean underscores.

    Raises:
        Refused: an unknown preset, file or setting, or a value of the wrong type.
    """
    switches, layers, overrides = _split(command, list(words))
    settings = Settings(command, dict(command.defaults), switches=frozenset(switches))
    for kind, name in layers:
        if kind == "preset":
            settings.preset = name
            _apply(settings, _read(_preset(command, name)), f"preset {name}")
        else:
            _apply(settings, _read(Path(name)), name)
    for name, value in overrides:
        _apply(settings, {name: value}, "the command line")
    return settings


def presets() -> dict[str, str]:
    """The packaged presets by name, each with the command that it is for."""
    found = {}
    for file in files("ral.presets").iterdir():
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = read_yaml(file.read_text("utf-8"))[_COMMAND]
    return dict(sorted(found.items()))


def _split(
    command: Command, words: list[str]
) -> tuple[list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Switches, (preset or config, name) and (setting, text), each in the order given."""
    switches: list[str] = []
    layers: list[tuple[str, str]] = []
    overrides: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") and not equals:
            raise Refused(
                f"{command.name}: settings must be key=value or --key value; got {word!r}"
            )
        if name in SWITCHES:
            switches.append(name)
            continue
        if not equals:
            switch = name in command.known and is_bool(command.known[name].hint)
            following = words[0] if words else None
            if following is None or following.startswith("--"):
                if not switch:
                    _check_known(command, name, "the command line")
                    raise Refused(f"{command.name}: --{name} must have a value; got none")
                value = "true"
            elif switch and following.lower() not in ("true", "false", "yes", "no", "1", "0"):
                value = "true"
            else:
                value = words.pop(0)
        if name in ("preset", "config"):
            layers.append((name, value))
        else:
            overrides.append((name, value))
    return switches, layers, overrides


def _preset(command: Command, name: str) -> Any:
    known = presets()
    if known.get(name) != command.name:
        fitting = ", ".join(preset for preset, of in known.items() if of == command.name)
        got = f"{name!r}, which is for {known[name]}" if name in known else repr(name)
        raise Refused(f"{command.name}: --preset must be one of {fitting or 'none'}; got {got}")
    return files("ral.presets") / f"{name}.yaml"


def _read(path: Any) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise Refused(f"--config: there is no file {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Refused(f"--config: {path} must be text in UTF-8; got {error}") from error
    try:
        content = read_yaml(text)
    except ValueError as error:
        raise Refused(f"--config: {path} must be YAML; got {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise Refused(f"--config: {path} must hold settings as `key: value`")
    return content


def _apply(settings: Settings, values: dict[str, Any], source: str) -> None:
    command = settings.command
    for key, value in values.items():
        name = key.replace("-", "_")
        name = RENAMED.get(name, name)
        if name == _COMMAND:
            if value != command.name:
                raise Refused(f"{command.name}: {source} is for the command {value}")
            continue
        _check_known(command, name, source)
        try:
            settings.values[name] = typed(value, command.known[name].hint)
        except ValueError as error:
            raise Refused(f"{command.name}: {name} {error} ({source})") from error
        settings.sources[name] = source


def _check_known(command: Command, name: str, source: str) -> None:
    if name in command.known:
        return
    near = meant(name, command.known) or difflib.get_close_matches(name, command.known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "--help and --help-all list them"
    raise Refused(f"{command.name}: there is no setting {name!r} ({source}); {hint}")


def value_text(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(value_text, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
