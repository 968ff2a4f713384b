"""``srccore images ...``: build, push and list the container images.

Progress goes to standard error, and only the result to standard output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srccore.cli.options import repeated
from srccore.containers.names import DEFAULT_REGISTRY, IMAGES, Images, read_digests
from srccore.errors import UserError
from srccore.files import atomically, writable

__all__ = ["app"]

app = typer.Typer(
    help="Build, push and list the container images.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: srccore images push --registry registry.example.com/team -o images.txt",
)

ToolName = Annotated[
    str | None,
    typer.Option("--tool", help="podman, buildah or docker; by default, the first one found."),
]
BASE_IMAGE_HELP = "The image to build the bases on: Debian with Python 3.11 and its venv module."


def _say(text: str) -> None:
    typer.echo(text, err=True)


@app.command(
    "build",
    epilog="Example: srccore images build --image curate-preference -- --network=host",
)
def build(
    names: Annotated[
        list[str], repeated("--image", "NAME", "Build only this image; may be repeated.")
    ],
    extra: Annotated[
        list[str],
        typer.Argument(
            metavar="-- ARGUMENTS",
            show_default=False,
            default_factory=list,
            help="More arguments for the tool, for every image.",
        ),
    ],
    base_image: Annotated[str | None, typer.Option(help=BASE_IMAGE_HELP)] = None,
    source: Annotated[str, typer.Option(help="The URL of the source code, for the label.")] = "",
    tool: ToolName = None,
) -> None:
    """Build the images of this checkout as localhost/srccore/NAME.

    Images share their bases, which are built first.
    """
    from srccore.containers import build

    built = build.build_images(
        build.find_tool(tool),
        build.open_checkout(),
        names,
        base_image=base_image or build.DEFAULT_BASE_IMAGE,
        source=source,
        extra=extra,
        starting=lambda image: _say(f"building {image}"),
    )
    for image in built:
        typer.echo(f"{image.name}  {image.size}  {image.seconds:.1f} s")


@app.command("push", epilog="Example: srccore images push --registry 127.0.0.1:5000 -o images.txt")
def push(
    registry: Annotated[
        str, typer.Option(help="The host and path before /srccore/NAME: registry.example.com/team.")
    ],
    names: Annotated[
        list[str], repeated("--image", "NAME", "Push only this image; may be repeated.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write the list to this file.")
    ] = None,
    tls_verify: Annotated[
        bool, typer.Option(help="Whether the registry must have a trusted certificate.")
    ] = True,
    tool: ToolName = None,
) -> None:
    """Push the images that were built, and print their digests."""
    from srccore.containers import build

    if out is not None and not out.parent.is_dir():
        raise UserError(
            f"The folder {out.parent} does not exist.", "Create it, or choose another --out."
        )
    lines = []
    pushed = build.push_images(
        build.find_tool(tool),
        registry,
        names,
        tls_verify=tls_verify,
        starting=lambda image: _say(f"pushing {image}"),
    )
    for line in pushed:
        typer.echo(line)
        lines.append(line)
    if out is not None:
        with writable(out), atomically(out) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@app.command("list", epilog="Example: srccore images list --registry mirror.example.com/src")
def list_images(
    registry: Annotated[
        str, typer.Option(help="The host and path before /srccore/NAME.")
    ] = DEFAULT_REGISTRY,
    digests: Annotated[
        Path | None,
        typer.Option(help="The list written by srccore images push, for this registry or another."),
    ] = None,
) -> None:
    """Print every image that a pipeline of this release may use."""
    known = read_digests(digests, registry) if digests else {}
    images = Images(registry, digests=known)
    for name in known or IMAGES:
        typer.echo(images.of(name))
