"""Frames of videos, animations and folders: which are chosen, and how they are read."""

import sys

import numpy as np
import pytest

from ral.data import DataError, natural_key, uniform_indices
from tests.integrations import films

from .data_case import CHOICE, NUMBER, grey, greys, load


@pytest.mark.parametrize("path", ["clip.gif", "clip.webp"])
def test_animations_are_videos(folder, path):
    dataset = load(folder, NUMBER | {"path": path}, max_frames=3)
    assert greys(dataset[0]["images"]) == [0, 2, 4]
    # As an image an animation is its first frame.
    dataset = load(folder, CHOICE | {"path": path})
    assert greys(dataset[0]["images"]) == [0]


@pytest.mark.parametrize(
    ("max_frames", "frames"), [(1, [6]), (2, [0, 11]), (4, [0, 4, 7, 11]), (12, list(range(12)))]
)
def test_frames_are_sampled_evenly_in_natural_order(folder, max_frames, frames):
    assert greys(load(folder, NUMBER, max_frames=max_frames)[0]["images"]) == frames
    listed = NUMBER | {"path": [f"clip/frame{i}.png" for i in range(12)]}
    assert greys(load(folder, listed, max_frames=max_frames)[0]["images"]) == frames


def test_video_files(folder):
    """The frames of an .mp4 are chosen as those of a folder."""
    pytest.importorskip("av")
    films.write(folder / "film.mp4", films.steps(12), g="4")
    images = load(folder, NUMBER | {"path": "film.mp4"}, max_frames=4)[0]["images"]
    assert [films.number_of(image, 12) for image in images] == [0, 4, 7, 11]
    (folder / "broken.mp4").write_bytes(b"no film")
    with pytest.raises(DataError, match=r"image, animation or video; got '.*broken.mp4': Invalid"):
        load(folder, NUMBER | {"path": "broken.mp4"})


def test_frames_a_second(folder):
    """`fps` counts by the times of a file; where there are none, `max_frames` alone counts."""
    pytest.importorskip("av")
    films.write(folder / "film.mp4", films.steps(12), g="4")  # 10 frames a second: 1.2 s

    def numbers(**options):
        images = load(folder, NUMBER | {"path": "film.mp4"}, **options)[0]["images"]
        return [films.number_of(image, 12) for image in images]

    assert numbers(fps=2) == [0, 11]  # 2.4 frames
    assert numbers(fps=2.5) == [0, 6, 11]
    assert numbers(fps=0.1) == [6]  # one at least
    assert numbers(fps=100) == list(range(12))
    assert numbers(fps=100, max_frames=3) == [0, 6, 11]
    frames = [grey(i) for i in range(5)]
    frames[0].save(folder / "slow.gif", save_all=True, append_images=frames[1:], duration=[500] * 5)
    slow = load(folder, NUMBER | {"path": "slow.gif"}, fps=1)[0]["images"]
    assert greys(slow) == [0, 4]  # of 2.5 s
    assert len(load(folder, NUMBER, fps=1)[0]["images"]) == 12
    [streamed] = load(folder, NUMBER | {"path": "film.mp4"}, fps=2, streaming=True)
    assert len(streamed["images"]) == 2


def test_without_pyav_a_video_is_to_be_extracted(folder, monkeypatch):
    (folder / "a").mkdir()
    (folder / "a" / "clip.MP4").write_bytes(b"a film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError) as error:
        load(folder, NUMBER | {"path": "a/clip.MP4"})
    assert (
        "got 'a/clip.MP4', and PyAV is missing. Install it with `pip install av`; or extract "
        "frames into a folder, say two a second, with `mkdir -p 'a/clip' && ffmpeg -i "
        "'a/clip.MP4' -vf fps=2 'a/clip/frame%05d.jpg'`, and give 'a/clip'"
    ) in str(error.value)


def test_uniform_indices_and_natural_keys():
    for total in range(1, 40):
        for count in range(1, 45):
            indices = uniform_indices(total, count)
            assert len(indices) == len(set(indices)) == min(total, count)
            assert indices == sorted(indices)
            assert indices[0] >= 0 and indices[-1] < total
            if 1 < count <= total:
                assert (indices[0], indices[-1]) == (0, total - 1)
                steps = np.diff(indices)
                assert steps.max() - steps.min() <= 1
    names = ["frame10.png", "Frame2.png", "frame1.png", "2", "10", "a", "1b", "frame"]
    assert sorted(names, key=natural_key) == [
        *("1b", "2", "10", "a", "frame", "frame1.png", "Frame2.png", "frame10.png")
    ]
