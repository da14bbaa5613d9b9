"""Settings of `python -m ral`: who is stronger, what type, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ral.cli import guesses
from ral.cli.errors import Refused
from ral.cli.help import help_text, overview
from ral.cli.main import COMMANDS, main
from ral.cli.parsing import Command, parse, presets
from ral.cli.typed import read_yaml, typed

TRAIN, SFT, DISTILL, EVAL = (
    next(command for command in COMMANDS if command.name == name)
    for name in ("train", "sft", "distill", "eval")
)


def values(*words: str, command: Command = TRAIN) -> dict[str, Any]:
    return parse(command, words).values


# -- types ----------------------------------------------------------------------------------------

TYPED = [
    ("1e-6", float, 1e-6),
    (1, float, 1.0),
    ("3", int, 3),
    ("1e3", int, 1000),
    (2.0, int, 2),
    ("true", bool, True),
    ("No", bool, False),
    (True, bool, True),
    ("null", int | None, None),
    ("none", float | None, None),
    ("none", str | None, "none"),
    (None, str | None, None),
    (12, str, "12"),
    ("-1", list[int] | int | str, -1),
    ("3,-1", list[int] | int | str, [3, -1]),
    ("[3, -1]", list[int] | int | str, [3, -1]),
    ([3, "-1"], list[int] | int | str, [3, -1]),
    ("all", list[int] | int | str, "all"),
    ("8", list[int], [8]),
    (8, list[int], [8]),
    ("", list[int], []),
    ("0.9,0.1", list[float] | None, [0.9, 0.1]),
    ("q_proj,v_proj", list[str], ["q_proj", "v_proj"]),
    ('{"a": 1}', dict[str, Any] | str | None, {"a": 1}),
    ({"a": 1}, dict[str, Any] | str | None, {"a": 1}),
    ("true", str | bool, True),
    ("runs/one", str | bool, "runs/one"),
    ("no", str | Literal[False] | None, "no"),
]


@pytest.mark.parametrize("value, hint, wanted", TYPED)
def test_typed(value: Any, hint: Any, wanted: Any) -> None:
    got = typed(value, hint)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    "value, hint, said",
    [
        ("high", float, "must be float; got 'high'"),
        ("2.5", int, "must be int"),
        (True, int, "must be int"),
        (True, float, "must be float"),
        (True, str, "must be text"),
        ("2", bool, "must be true or false"),
        (None, float, "must be float; got None"),
        ("3,x", list[int] | int, "must be list of int or int"),
        ([1, 2], float, "must be float"),
        ("a", dict[str, Any], "must be mapping"),
        ("nan?", int | None, "must be int"),
    ],
)
def test_not_typed(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        typed(value, hint)
    assert str(error.value).startswith(said)


def test_words_of_yaml_stay_words() -> None:
    """YAML 1.1 reads `no` as false, and `save_strategy: no` is a word of transformers."""
    assert read_yaml("{a: no, b: on, c: off, d: yes}") == {
        "a": "no", "b": "on", "c": "off", "d": "yes",
    }  # fmt: skip
    assert read_yaml("{a: true, b: False}") == {"a": True, "b": False}
    with pytest.raises(ValueError, match="line 2"):
        read_yaml("a: 1\nb: [")


# -- precedence -----------------------------------------------------------------------------------


def test_later_is_stronger(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("temperature: 0.5\nbeta: 0.5\nmax_steps: 5\nattn-coef: 5\n")
    two.write_text("beta: 0.6\nmax_steps: 6\n")
    preset = values("--preset", "paper")
    assert preset["temperature"] == 0.9 and preset["beta"] == 0.04
    # Overrides are stronger than files wherever they stand.
    got = values(
        "max_steps=7", "--preset", "paper", "--config", str(one), f"--config={two}", "--seed", "8"
    )
    assert (got["temperature"], got["beta"], got["max_steps"]) == (0.5, 0.6, 7)
    assert (got["attn_coef"], got["seed"], got["max_grad_norm"]) == (5.0, 8, 5.0)
    assert values("max_steps=7", "max_steps=8")["max_steps"] == 8


@pytest.mark.parametrize(
    "words",
    [
        ("attn_layers=-1", "freeze_vision=false"),
        ("--attn-layers", "-1", "--freeze-vision", "false"),
        ("--attn_layers=-1", "--freeze_vision=no"),
        ("--freeze-vision=false", "attn-layers=-1"),
    ],
)
def test_ways_to_write_a_setting(words: tuple[str, ...]) -> None:
    got = values(*words)
    assert got["attn_layers"] == -1 and got["freeze_vision"] is False


def test_a_switch_needs_no_value() -> None:
    got = values("--streaming", "--verbose", "max_steps=3", "--use_vllm")
    assert got["streaming"] is True and got["verbose"] is True and got["max_steps"] == 3
    assert got["use_vllm"] is True


def test_values_may_hold_equals_signs() -> None:
    assert values("data=a=b.jsonl")["data"] == "a=b.jsonl"


def test_defaults_of_a_command() -> None:
    assert values()["num_iterations"] == 2  # one would be plain GRPO, and is refused
    assert values(command=DISTILL)["attn_coef"] == 0 < values(command=DISTILL)["distill_attn_coef"]
    assert values(command=SFT)["max_length"] is None


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (("atn_coef=3",), "did you mean attn_coef"),
        (("--num-generation", "3"), "did you mean num_generations"),
        (("zzz=3",), "--help and --help-all list them"),
        (("learning_rate=high",), "learning_rate must be float; got 'high' (the command line)"),
        (("--learning_rate",), "--learning_rate must have a value"),
        (("--preset", "papers"), "--preset must be one of "),
        (("--preset", "distill"), "got 'distill', which is for distill"),
        (("--config", "/no/such.yaml"), "there is no file /no/such.yaml"),
        (("digits",), "settings must be key=value or --key value; got 'digits'"),
    ],
)
def test_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused) as error:
        parse(TRAIN, words)
    assert said in str(error.value)


# What people bring from other trainers: command, what they write, what it is called here.
GUESSED = [
    (TRAIN, "lr", "learning_rate"),
    (TRAIN, "LR", "learning_rate"),
    (TRAIN, "grad_accum", "gradient_accumulation_steps"),
    (SFT, "batch-size", "per_device_train_batch_size"),
    (TRAIN, "epochs", "num_train_epochs"),
    (TRAIN, "max_new_tokens", "max_completion_length"),
    (EVAL, "max_completion_length", "max_new_tokens"),
    (EVAL, "max_frames", "frames"),
    (TRAIN, "frames", "max_frames"),
    (TRAIN, "kl_coef", "beta"),
    (TRAIN, "model_name_or_path", "model"),
    (DISTILL, "dataset_name", "data"),
]


@pytest.mark.parametrize("command, written, name", GUESSED)
def test_names_from_elsewhere_are_answered(command: Command, written: str, name: str) -> None:
    with pytest.raises(Refused) as error:
        parse(command, (f"{written}=1",))
    assert str(error.value).endswith(f"(the command line); did you mean {name}?")


def test_guesses_are_no_settings_and_name_settings() -> None:
    known = {name for command in COMMANDS for name in command.known}
    assert set(guesses.WRITTEN) <= known
    for command in COMMANDS:
        for name, written in guesses.WRITTEN.items():
            if name in command.known:
                taken = set(written.split()) & set(command.known)
                assert not taken, f"{command.name}: {taken}"
    assert not set(guesses.RENAMED) & known


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: [", "must be YAML"),
        ("- 1\n", "must hold settings"),
        ("tempratur: 1\n", "did you mean temperature"),
        ("temperature: warm\n", "temperature must be float; got 'warm' ("),
        ("command: sft\n", "is for the command sft"),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(Refused) as error:
        parse(TRAIN, ("--config", str(file)))
    assert said in str(error.value) and str(file) in str(error.value)


def test_a_setting_of_another_command_is_refused() -> None:
    with pytest.raises(Refused, match="there is no setting 'attn_coef'"):
        parse(SFT, ("attn_coef=1",))
    with pytest.raises(Refused, match="there is no setting 'teacher_model'"):
        parse(SFT, ("teacher_model=x",))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_numbers_of_threads_are_refused(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, -1):
        assert main([command.name, f"threads={number}"]) == 2
        assert f"threads must be >= 1; got {number}" in capsys.readouterr().err


# -- print-config and help ------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_presets_come_back_from_print_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = presets()[name]
    assert main([of, "--preset", name, "seed=3", "learning_rate=2e-7", "--print-config"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    command = next(command for command in COMMANDS if command.name == of)
    again = parse(command, ("--config", str(file)))
    assert again.as_yaml() == printed
    first = parse(command, ("--preset", name, "seed=3", "learning_rate=2e-7"))
    assert {k: again.values[k] for k in first.values} == first.values
    shown = yaml.safe_load(printed)
    assert shown["command"] == of and shown["seed"] == 3
    assert set(shown) >= {n for n, setting in command.known.items() if setting.is_ours}


def test_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """What arXiv 2602.04884 reports."""
    got = values("--preset", "paper")
    wanted = {
        "num_generations": 8, "temperature": 0.9, "accuracy_weight": 0.9, "format_weight": 0.1,
        "beta": 0.04, "attn_coef": 1.0, "learning_rate": 1e-6, "max_grad_norm": 5.0,
        "max_completion_length": 768, "freeze_vision": True, "style": "think",
    }  # fmt: skip
    assert {name: got[name] for name in wanted} == wanted
    zero = values("--preset", "paper-zero")
    assert zero == {**got, "style": "direct"}


@pytest.mark.parametrize("name", [name for name, of in presets().items() if of != "sft"])
def test_presets_are_schedules_with_a_signal(name: str, tmp_path: Path) -> None:
    """On one process, as RALConfig checks them."""
    from ral import RALConfig

    command = next(command for command in COMMANDS if command.name == presets()[name])
    given = parse(command, ("--preset", name, "bf16=false", "report_to=none"))
    values = {**given.of(RALConfig), "output_dir": str(tmp_path)}
    values["per_device_train_batch_size"] = max(8, values["per_device_train_batch_size"])
    config = RALConfig(**values)
    assert config.attn_coef > 0 or config.needs_teacher


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help(command: Command) -> None:
    short, long = help_text(command, False), help_text(command, True)
    for name, setting in command.known.items():
        assert f"\n  {name}  (" in long, name
        if setting.is_ours:
            assert f"\n  {name}  (" in short and setting.help, name
    if command.name == "train":
        assert len(long) > 2 * len(short)
        assert "num_iterations  (int; default 2)" in short  # as the command has it, not TRL
        for group in ("model:", "data:", "attention:", "rewards:"):
            assert f"\n{group}\n" in short


def test_overview_names_everything() -> None:
    text = overview(COMMANDS, {"attention-map": "draw"})
    for name in (*(command.name for command in COMMANDS), *presets(), "attention-map"):
        assert f"\n  {name} " in text


@pytest.mark.parametrize(
    "words, status, said",
    [
        ([], 2, "usage: python -m ral"),
        (["--help"], 0, "commands:"),
        (["trian"], 2, "did you mean train?"),
        (["train", "--help"], 0, "attn_coef"),
        (["eval", "--help-all"], 0, "max_pixels"),
        (["attention-map", "x.png"], 2, "--prompt"),
    ],
)
def test_words(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
