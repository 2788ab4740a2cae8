"""predict: what a finished run says of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import Json, StoreDir, emit, say, store_at


def predict(
    run: Annotated[str, typer.Argument(help="A finished run, or the beginning of its id.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...")],
    store: StoreDir = Path("runs"),
    out: Annotated[Path, typer.Option("--out", help="Folder of the drawings.")] = Path("predictions"),
    score: Annotated[float, typer.Option("--score", min=0, max=1, help="Objects with less are not shown.")] = 0.3,
    json: Json = False,
) -> None:
    """Draw what a run of segment, detect, finetune or linprobe finds in any picture, to OUT/NAME.png."""
    from sdae.predict import predict as draw

    found = draw(store_at(store), run, pictures, out, score)
    if json:
        return emit(found)
    for entry in found:
        say(f"{entry['picture']} -> {entry['drawn']}: {said(entry)}")


def said(entry: dict[str, object]) -> str:
    """What was found, in a line."""
    objects, shares = entry.get("objects"), entry.get("shares") or entry.get("classes")
    if isinstance(objects, list):
        return ", ".join(f"{o['class']} {o['score']:.2f}" for o in objects) or "no object"
    assert isinstance(shares, dict)
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in ordered[:5])
