"""The picture of README: megabytes that a long chat holds, turn by turn, with the full cache and with kvfold's plans.

`python docs/make/long_chat.py` holds the chats and draws docs/pictures/long-chat.svg; the megabytes are the ledger's.
The picture for a dark page, long-chat-dark.svg, is the same one in other colours: with `--dark` only it is made anew.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from transformers import GenerationConfig

import kvfold

PICTURE = Path(__file__).resolve().parents[1] / "pictures" / "long-chat.svg"
DARK = PICTURE.with_name("long-chat-dark.svg")
COLOURS = {  # of the light page, and what stands for them on a dark one
    "#ffffff": "none",
    "#000000": "#e6e6e6",
    "#1f77b4": "#4db6e2",
    "#ff7f0e": "#ffa657",
    "#2ca02c": "#76c487",
}
MODEL, TURNS = "smollm2", 24
PLANS = {
    "full": "everything (full)",
    "int8(rotate=True)": "8 bits (the default)",
    "snapkv(keep=0.2)": "snapkv, a fifth",
}
QUESTION = (
    "Number {turn} of my notes: this parcel weighs {weight} kg, goes to dock {dock} and leaves before {hour} o'clock; "
    "the driver wants a signature, the customs paper and a photo of the seal. What should I write down about it?"
)


def held(plan: str) -> list[float]:
    """Hold a chat by a plan; megabytes after each turn."""
    model, tokenizer = kvfold.load(MODEL)
    short = GenerationConfig(max_new_tokens=24, do_sample=False)
    chat = kvfold.Chat(model, tokenizer, plan, generation=short)
    megabytes = []
    for turn in range(1, TURNS + 1):
        chat.reply(QUESTION.format(turn=turn, weight=3 * turn, dock=turn % 7, hour=turn % 12 + 1))
        megabytes.append(chat.ledger().stored_bytes / 1e6)
        print(f"{plan}: turn {turn}, {megabytes[-1]:.1f} MB", file=sys.stderr)
    return megabytes


def darkened(picture: str) -> str:
    """Give a picture of a light page the colours of a dark one; letters have the colour of the whole."""
    for light, dark in COLOURS.items():
        picture = picture.replace(light, dark)
    return picture.replace("<svg ", f'<svg fill="{COLOURS["#000000"]}" ', 1)


def main() -> None:
    """Hold the chats one after the other, and draw them."""
    figure = Figure(figsize=(7, 3.4))
    axes = figure.subplots()
    for plan, label in PLANS.items():
        megabytes = held(plan)
        axes.plot(range(1, TURNS + 1), megabytes, label=f"{label}: {megabytes[-1]:.0f} MB", linewidth=2)
    axes.set(xlabel="turns of the chat", ylabel="MB held", xlim=(1, TURNS), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    if "--dark" not in sys.argv:
        main()
    DARK.write_text(darkened(PICTURE.read_text(encoding="utf-8")), encoding="utf-8")
