"""The reader of videos: which frames, when, upright, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")
from PIL import Image

from ral_kernels import viz
from ral_kernels.media import video_file, videos

from . import films

COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    films.write(folder / "film.mp4", films.steps(COUNT), g="8", bf="2")
    (folder / "broken.mp4").write_bytes(b"not a film" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "suffix, codec",
    [(".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx"),
     (".mpg", "mpeg2video")],
)  # fmt: skip
def test_frames_by_number(tmp_path: Path, suffix: str, codec: str) -> None:
    """By seeking to key frames, the same as all frames decoded in order."""
    film = films.write(tmp_path / f"a{suffix}", films.steps(COUNT), fps=25, codec=codec, g="8")
    assert viz.count_frames(film) == COUNT
    made = viz.read_pictures(film, range(COUNT))
    assert [films.number_of(frame, COUNT) for frame in made] == list(range(COUNT))
    for chosen in ([29], [3, 25], [17, 2, 17]):
        again = viz.read_pictures(film, chosen)
        for number, frame in zip(chosen, again, strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(made[number]))
    assert films.number_of(viz.read_pictures(film)[0], COUNT) == 0


def test_only_what_is_needed_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 frames with a key frame every 8: two groups, and no other."""
    positions: list[Any] = []
    original = video_file._upright
    monkeypatch.setattr(video_file, "_upright", lambda frame: original(frame))
    import av

    opened = av.open

    class Counting:
        def __init__(self, container: Any) -> None:
            self.inner = container

        def __enter__(self) -> Counting:
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def decode(self, stream: Any) -> Any:
            for frame in self.inner.decode(stream):
                positions.append(frame.pts)
                yield frame

    monkeypatch.setattr(av, "open", lambda file: Counting(opened(file)))
    made = viz.read_pictures(folder / "film.mp4", [1, 25])
    assert [films.number_of(frame, COUNT) for frame in made] == [1, 25]
    assert len(positions) == 2 + 2


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, [0, 6, 12, 17, 23, 29]),  # two a second of three seconds
        ({"fps": 1}, [0, 14, 29]),
        ({"fps": 99}, list(range(30))),
        ({"fps": 0.01}, [0]),
        ({"num_frames": 4}, [0, 10, 19, 29]),
        ({"num_frames": 1}, [0]),
        ({"num_frames": 400}, list(range(30))),
    ],
)
def test_sampling(folder: Path, options: dict[str, Any], wanted: list[int]) -> None:
    film = viz.read_video(folder / "film.mp4", **options)
    assert [films.number_of(frame, COUNT) for frame in film.frames] == wanted
    assert film.times == pytest.approx([number / 10 for number in wanted])
    assert film.duration == pytest.approx(3.0)


def test_frames_at_uneven_times(tmp_path: Path) -> None:
    stamps = [0, 40, 500, 540, 2000]
    film = films.write(tmp_path / "a.mkv", films.steps(5), stamps=stamps, bf="0")
    made = viz.read_video(film, num_frames=5)
    assert made.times == pytest.approx([stamp / 1000 for stamp in stamps], abs=2e-3)
    assert made.duration == pytest.approx(2.5, abs=0.01)
    assert viz.frame_times(film) == (list(made.times), made.duration)


def test_a_phone_held_upright(tmp_path: Path) -> None:
    scene = Image.new("RGB", (64, 48), "black")
    scene.paste((255, 255, 255), (0, 0, 32, 24))  # top left
    film = films.turn(films.write(tmp_path / "a.mp4", [scene] * 3))
    made = viz.read_video(film, num_frames=1).frames[0]
    assert made.size == (48, 64)
    bright = np.asarray(made.convert("L")) > 128
    assert bright[:32, 24:].mean() > 0.9 > 0.1 > bright[32:].mean()  # now top right


def test_animations_have_times(tmp_path: Path) -> None:
    frames = films.steps(5)
    for name, options in {
        "a.gif": {"duration": [100, 200, 300, 400, 500]},
        "a.webp": {"duration": [100, 200, 300, 400, 500], "lossless": True},
        "b.gif": {},
    }.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)  # type: ignore[arg-type]
    for name in ("a.gif", "a.webp"):
        made = viz.read_video(tmp_path / name, num_frames=5)
        assert made.times == pytest.approx([0, 0.1, 0.3, 0.6, 1.0]) and made.duration == 1.5
    assert viz.frame_times(tmp_path / "a.gif")[0] == pytest.approx([0, 0.1, 0.3, 0.6, 1.0])
    assert viz.read_video(tmp_path / "a.gif").times == pytest.approx([0, 0.3, 1.0])
    assert viz.read_video(tmp_path / "b.gif", num_frames=2).times == pytest.approx([0, 0.4])


def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reason in (("broken.mp4", "Invalid data"), ("empty.mp4", "it is empty")):
        with pytest.raises(viz.PictureError, match=rf"a video must be .*{name}': {reason}"):
            viz.read_video(folder / name)
    with pytest.raises(OSError, match="No such file"):
        viz.read_video(folder / "none.mp4")
    with pytest.raises(ValueError, match=r"frames must lie in \[0, 30\); got 30"):
        viz.read_pictures(folder / "film.mp4", [30])
    for options, error, message in (
        ({"fps": 1, "num_frames": 2}, ValueError, "fps must be None where num_frames is given"),
        ({"fps": 0}, ValueError, "fps must be positive; got 0"),
        ({"num_frames": -1}, ValueError, "num_frames must be positive; got -1"),
        ({"num_frames": 1.5}, TypeError, "num_frames must be a number; got 1.5"),
        ({"fps": "2"}, TypeError, "fps must be a number; got '2'"),
    ):
        with pytest.raises(error, match=f"read_video: {message}"):  # type: ignore[arg-type]
            viz.read_video(folder / "film.mp4", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many as frames, at least one, and rising"):
        videos.Video((), (), 1.0)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"film.mp4 needs PyAV; .*`pip install av`"):
        viz.read_video(folder / "film.mp4")
