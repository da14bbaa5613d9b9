"""Where a model looks in a video as it answers: pictures, numbers, and the share of each frame.

    python examples/attention_maps_of_a_video.py    # the bundled model and its digits
    python examples/attention_maps_of_a_video.py FRAMES --model MODEL --question "Where is the cup?"

FRAMES is a folder of pictures in the order of their names, as ffmpeg writes them:
ffmpeg -i film.mp4 -vf fps=1 FRAMES/%04d.png
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

import ral_kernels as rk
from ral.digits import load_pretrained
from ral.digits.puzzles import draw, make_puzzle
from ral.digits.tasks import prompt as ask
from ral_kernels import viz
from ral_kernels.integrations.transformers import load_processor


def digits(frames: int) -> tuple[list[Any], str, list[dict]]:
    """Frames of handwritten digits, a question, and the chat that asks it, with each time."""
    puzzle = make_puzzle("timestamp", frames, "test", seed=2, index=0)
    messages = [{"role": "user", "content": ask(puzzle, "think")}]
    return list(draw(puzzle, "test")), messages[0]["content"][-1]["text"], messages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("frames", nargs="?", type=Path, help="folder of pictures; default: digits")
    parser.add_argument("--model", help="folder or name of a vision-language model")
    parser.add_argument("--question", default="What happens?")
    parser.add_argument("--out", type=Path, default=Path("attention-of-a-video"))
    given = parser.parse_args()
    if (given.frames is None) != (given.model is None):
        parser.error("FRAMES and --model go together: the bundled model knows digits only")

    prompt: Any
    if given.frames is None:
        images, question, prompt = digits(frames=16)
        model, processor = load_pretrained()
    else:
        images, question, prompt = sorted(given.frames.iterdir()), given.question, given.question
        model = AutoModelForImageTextToText.from_pretrained(given.model, dtype="auto").eval()
        processor = load_processor(given.model)

    # One call: the model answers, then one forward gives the rows of the last layer.
    maps = rk.attention_map(model, processor, images, prompt, max_new_tokens=64)
    print("question:", question)
    print("answer:  ", maps.text)
    for number, token in enumerate(maps.tokens):
        share, frame = maps.image_shares[number].max(0)
        print(f"{token!r:>14}: {share:4.0%} of its attention on frame {int(frame) + 1}")

    given.out.mkdir(parents=True, exist_ok=True)
    viz.attention_over_frames(maps, question=question, path=given.out / "mean.png")
    viz.film_strip(maps, path=given.out / "film-strip.png")
    viz.token_frame(maps, path=given.out / "token-frame.png")
    print("pictures:", given.out)


if __name__ == "__main__":
    main()
