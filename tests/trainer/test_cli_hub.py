"""Names that are no path: one question to the Hub, here a server that answers as it does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from ral.cli.errors import Refused
from ral.cli.hub import check_model_name, check_on_hub
from ral.cli.main import main

ANSWERS = {"good": (200, ""), "none": (404, "RepoNotFound"), "bare": (404, "EntryNotFound"),
           "gated": (403, "GatedRepo"), "down": (500, "")}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The paths that were asked for; OWNER says how the server answers."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            status, code = ANSWERS[self.path.split("/")[1]]
            self.send_response(status)
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_url", lambda name, file, repo_type: f"{at}/{name}/{file}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind, file", [("model", "config.json"), ("dataset", "README.md")])
def test_one_question(asked: list[str], kind: str, file: str) -> None:
    for owner in ("good", "bare", "gated"):  # which `from_pretrained` and `datasets` take up
        check_on_hub(f"{owner}/name", kind)
    with pytest.raises(Refused, match=f"no {kind} folder none/name, and no {kind} of that name on"):
        check_on_hub("none/name", kind)
    with pytest.raises(Refused, match=f"no {kind} folder down/name, and the Hub cannot be reached"):
        check_on_hub("down/name", kind)
    assert asked == [f"/{o}/name/{file}" for o in ("good", "bare", "gated", "none", "down")]


def test_what_is_in_the_cache_is_not_asked_for(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--none--name" / "snapshots" / "0").mkdir(parents=True)
    check_model_name("none/name")
    assert asked == []


def test_a_path_is_not_asked_for(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good" / "model").mkdir(parents=True)
    check_model_name("good/model")
    for name in ("good/typo", "typo", "./good/typo", "a/b/c", "/typo", "~/typo"):
        with pytest.raises(Refused, match=rf"there is no model folder {name}, and that is not a"):
            check_model_name(name)
    assert asked == []


@pytest.mark.parametrize("command", ["train", "sft", "distill", "eval"])
def test_commands_ask_before_they_load(
    command: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    run = [] if command == "eval" else [f"output_dir={tmp_path / 'run'}", "use_cpu=true"]
    rows = f"data={tmp_path / 'rows.jsonl'}"
    assert main([command, "model=none/name", rows, *run]) == 2
    assert "no model of that name on the Hub" in capsys.readouterr().err
    run += [f"teacher_model={tmp_path}"] if command == "distill" else []
    assert main([command, f"model={tmp_path}", "data=none/rows", *run]) == 2
    assert "no dataset of that name on the Hub" in capsys.readouterr().err
    assert asked == ["/none/name/config.json", "/none/rows/README.md"]


def test_offline(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # the next one reads it
    try:
        with pytest.raises(Refused, match="not in the Hub's cache, and HF_HUB_OFFLINE is set"):
            check_model_name("good/name")
    finally:
        monkeypatch.undo()
        huggingface_hub.close_session()
    assert asked == []
