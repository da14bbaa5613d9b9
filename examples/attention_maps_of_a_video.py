"""Where a model looks in a video as it answers: pictures, numbers, and the share of each frame.

    python examples/attention_maps_of_a_video.py          # the bundled model, and frames of digits
    python examples/attention_maps_of_a_video.py film.mp4 --model MODEL --question "Where is it?"

MODEL is a folder or a name on the Hub, of a family with videos such as Qwen2.5-VL. Video files need
PyAV: `pip install av`.
"""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText

import ral_kernels as rk
from ral.digits import load_pretrained
from ral.digits.puzzles import draw, make_puzzle
from ral.digits.tasks import prompt
from ral_kernels import viz
from ral_kernels.integrations.transformers import load_processor


def digits_map() -> tuple[Any, str]:
    """The bundled model reads frames as images, each after its time, in the messages of a chat."""
    puzzle = make_puzzle("timestamp", 16, "test", seed=2, index=0)
    frames = tuple(Image.fromarray(frame) for frame in draw(puzzle, "test"))
    times = tuple(float(time) for time in puzzle.times)
    video = viz.Video(frames, times, duration=100.0)
    messages = [{"role": "user", "content": prompt(puzzle, "think")}]
    question = messages[0]["content"][-1]["text"]
    return rk.attention_map(*load_pretrained(), video, messages), question


def video_map(path: Path, model: str, question: str, frames: int) -> Any:
    """Any other: the model answers, then one forward gives the rows of its last layer."""
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval()
    return rk.attention_map(
        loaded, load_processor(model), videos=path, num_frames=frames, prompt=question
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("video", nargs="?", type=Path, help="a file; default: frames of digits")
    parser.add_argument("--model", help="folder or name of a vision-language model")
    parser.add_argument("--question", default="What happens?")
    parser.add_argument("--frames", type=int, default=16, help="how many, evenly spread")
    parser.add_argument("--out", type=Path, default=Path("attention-of-a-video"))
    given = parser.parse_args()
    if (given.video is None) != (given.model is None):
        parser.error("a video and --model go together: the bundled model knows digits only")
    if given.video is None:
        maps, question = digits_map()
    else:
        question = given.question
        maps = video_map(given.video, given.model, question, given.frames)

    print("question:", question)
    print("answer:  ", maps.text)
    for number, token in enumerate(maps.tokens):
        share, frame = maps.image_shares[number].max(0)
        print(f"{token!r:>14}: {share:4.0%} of its attention on {maps.name(int(frame))}")

    given.out.mkdir(parents=True, exist_ok=True)
    viz.attention_over_frames(maps, question=question, path=given.out / "mean.png")
    viz.film_strip(maps, path=given.out / "film-strip.png")
    viz.token_frame(maps, path=given.out / "token-frame.png")
    maps.save(given.out / "map.npz")  # AttentionMap.load reads it
    print("written:", *sorted(path.name for path in given.out.iterdir()))


if __name__ == "__main__":
    main()
