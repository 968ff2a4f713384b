"""``python -m srccore.embedded``: makes the material, the data and the models of preset `tiny`.

Run in this order to make everything again::

    python -m srccore.embedded vendor
    python -m srccore.embedded pretrain
    python -m srccore.embedded pretrain-rating
    python -m srccore.embedded cards

``preview --out items.png`` draws a sheet of items to look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
MODELS = Path(__file__).parent / "models"
Seed = Annotated[int, typer.Option(help="Seed of data, order and weights.")]


@app.command()
def vendor() -> None:
    """Fetch the vendored images and tables again (npm and pip)."""
    from srccore.embedded.vendor import vendor as run

    run()


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = MODELS / "lvlm",
    seed: Seed = 0,
    items: Annotated[int, typer.Option(help="Items of the pretraining split.")] = 30_000,
    vision_steps: Annotated[int, typer.Option(help="Steps of only the vision tower.")] = 2800,
    seeing_steps: Annotated[int, typer.Option(help="Steps of describing images.")] = 2600,
    steps: Annotated[int, typer.Option(help="Steps of flawed conversations.")] = 2400,
) -> None:
    """Train the vision-language model from scratch (about 40 minutes on two cores)."""
    from srccore.embedded.pretrain import pretrain as run

    run(
        out,
        seed=seed,
        items=items,
        vision_steps=vision_steps,
        seeing_steps=seeing_steps,
        steps=steps,
    )


@app.command("pretrain-rating")
def pretrain_rating(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = MODELS / "rating",
    seed: Seed = 0,
    items: Annotated[int, typer.Option(help="Items of the pretraining split.")] = 20_000,
    steps: Annotated[int, typer.Option(help="Steps.")] = 1600,
) -> None:
    """Train the base of R-Scorer from scratch (about 10 minutes on two cores)."""
    from srccore.embedded.pretrain_rating import pretrain_rating as run

    run(out, seed=seed, items=items, steps=steps)


@app.command()
def cards() -> None:
    """Measure both models on the held-out split and write their cards."""
    from srccore.embedded.card import write_cards

    write_cards()


@app.command()
def preview(
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    split: Annotated[str, typer.Option(help="One of the splits.")] = "train",
    seed: Seed = 0,
) -> None:
    """Draw 40 items of a split on one sheet."""
    from PIL import Image

    from srccore.embedded.world import IMAGE_SIZE, make_item

    sheet = Image.new("RGB", (10 * IMAGE_SIZE, 4 * IMAGE_SIZE))
    for number in range(40):
        place = (number % 10 * IMAGE_SIZE, number // 10 * IMAGE_SIZE)
        sheet.paste(make_item(seed, split, number).image, place)
    sheet.save(out)


if __name__ == "__main__":
    app()
