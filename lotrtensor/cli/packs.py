"""lotr pack, add, remove, refit, unpack: many adapters of one model in one directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import typer

from lotrtensor.adapters.formats.directory import expand
from lotrtensor.adapters.formats.layout import check_lora_output
from lotrtensor.cli.common import (
    Force,
    Json,
    OutputPath,
    output_console,
    print_json,
    progress_bar,
)
from lotrtensor.errors import FormatError, MissingPackageError
from lotrtensor.packs._pack import name_adapters
from lotrtensor.packs._pack import pack as pack_adapters
from lotrtensor.packs._refit import refit as refit_pack
from lotrtensor.packs.pack import Pack
from lotrtensor.packs.spool import Source
from lotrtensor.report.packs import pack_document, pack_line, pack_table
from lotrtensor.report.tables import error, size
from lotrtensor.verbs._compare import compare

PackPath = Annotated[Path, typer.Argument(metavar="PACK", help="Directory of the pack.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of an adapter in the pack.")]
Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER...",
        path_type=str,
        help="Adapters, each a path or NAME=PATH; a path alone is named by its last part.",
    ),
]
Tolerance = Annotated[
    float | None, typer.Option(help="Relative error that no adapter exceeds, each against its own.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads; as many as processors if not given.")
]
Dask = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Run on a Dask cluster that sees the files: tcp://…"),
]


def named(adapters: list[str]) -> dict[str, Source]:
    """Return adapters by name: ``NAME=PATH``, or a path alone."""
    found: dict[str, Source] = {}
    for text in adapters:
        name, equals, path = text.partition("=")
        own = equals and path and not _exists(text)
        for key, source in ({name: path} if own else name_adapters([text])).items():
            if key in found:
                raise FormatError(
                    f"two adapters have the name {key!r}; name one of them otherwise: NAME={source}"
                )
            found[key] = source
    return found


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:
        return False


@contextlib.contextmanager
def workers(count: int | None, dask: str | None) -> Iterator[Executor]:
    """Threads, or the workers of a Dask cluster."""
    if dask is None:
        with ThreadPoolExecutor(count) as threads:
            yield threads
        return
    try:
        from distributed import Client
    except ImportError as missing:
        raise MissingPackageError(
            "--dask needs the package distributed: pip install 'dask[distributed]'"
        ) from missing
    try:
        client = Client(dask)
    except (OSError, ValueError) as found:
        raise FormatError(f"no Dask scheduler answers at {dask}: {found}") from found
    with client, client.get_executor() as executor:
        yield executor


def pack(
    adapters: Adapters,
    output: OutputPath,
    tolerance: Tolerance = None,
    budget: Annotated[
        str | None, typer.Option(help="Size of the pack at most: 8MB, or 5% of the adapters'.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Ranks of every basis: cores alone, nothing private.")
    ] = None,
    clusters: Annotated[
        int, typer.Option(help="Clusters of adapters with bases of their own, at most.")
    ] = 1,
    share: Annotated[
        Literal["auto", "adapters", "layers", "both", "none"],
        typer.Option(help="What shares a basis; auto takes what needs the fewest bytes."),
    ] = "auto",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out adapters that cannot be read.")
    ] = False,
    threads: Workers = None,
    dask: Dask = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Pack adapters of one base model: what they share once, what is their own in bits.

    Example: lotr pack tuned-1 tuned-2 tuned-3 -o my-pack --tolerance 0.2
    """
    with workers(threads, dask) as executor, progress_bar() as progress:
        found = pack_adapters(
            named(adapters),
            output,
            tolerance=tolerance,
            budget=budget,
            rank=rank,
            clusters=clusters,
            share=share,
            executor=executor,
            skip_bad=skip_bad,
            force=force,
            progress=progress,
        )
    show_pack(found, json=json)


def show_pack(found: Pack, *, json: bool) -> None:
    """Print a pack: a table, or a document."""
    document = pack_document(found)
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(pack_table(document))
    console.print(pack_line(document), markup=False)


def add(
    path: PackPath,
    adapters: Adapters,
    tolerance: Tolerance = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Relative error past which an adapter is refused."),
    ] = None,
    threads: Workers = None,
    dask: Dask = None,
    json: Json = False,
) -> None:
    """Add adapters to a pack, all or none; no file that stands there is written again.

    Example: lotr add a-pack my-tuned
    """
    found, sources = Pack(path), named(adapters)
    taken = next((name for name in sources if name in found.names), None)
    if taken is not None:
        raise FormatError(f"{path} holds an adapter {taken!r} already; name this one NAME=PATH")
    with workers(threads, dask) as executor, progress_bar("adding") as progress:
        found.add_all(
            sources,
            tolerance=tolerance,
            max_error=max_error,
            executor=executor,
            progress=progress,
        )
    show_pack(found, json=json)


def remove(
    path: PackPath,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of adapters.")],
    json: Json = False,
) -> None:
    """Remove adapters from a pack.

    Example: lotr remove a-pack tuned-2
    """
    found = Pack(path)
    for name in names:
        found.row(name)
    for name in dict.fromkeys(names):
        found.remove(name)
    show_pack(found, json=json)


def refit(
    path: PackPath,
    originals: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTER]...",
            path_type=str,
            help="Originals, paths or NAME=PATH; an adapter without one is taken from the pack.",
        ),
    ] = None,
    tolerance: Tolerance = None,
    threads: Workers = None,
    dask: Dask = None,
    json: Json = False,
) -> None:
    """Fit the bases of a pack anew, for the adapters that it holds by now.

    Example: lotr refit a-pack tuned-1 tuned-2 tuned-3
    """
    given = named(originals or [])
    with workers(threads, dask) as executor, progress_bar() as progress:
        found = refit_pack(
            Pack(path), given, tolerance=tolerance, executor=executor, progress=progress
        )
    show_pack(found, json=json)


def unpack(
    path: PackPath,
    name: Name,
    output: OutputPath,
    rank: Annotated[
        int | None, typer.Option(help="Largest LoRA rank; the original one if not given.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write one adapter of a pack as a portable LoRA, without reading the others.

    Example: lotr unpack a-pack tuned-1 -o one-lora
    """
    check_lora_output(output, force=force)
    if expand(output).resolve().is_relative_to(expand(path).resolve()):
        raise FormatError(f"{output} is inside of the pack {path}; choose another output")
    with progress_bar("unpacking"):
        member = Pack(path).member(name)
        lora = member.to_lora(rank)
        lora.save(output, force=force)
        found = compare(lora, type(lora)(member.updates(), {}, lora.dtype)).relative_error
    document = {"name": name, "bytes": lora.bytes, "relative_difference": found}
    if json:
        print_json(document)
        return
    console = output_console()
    console.print(f"{output}: {size(lora.bytes)}, as {name} is stored", markup=False)
    console.print(f"relative difference to what the pack holds: {error(found)}")


def serve_plan(
    path: PackPath,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="Rank of a slot; what the unpacked adapters need by default.")
    ] = None,
    max_loras: Annotated[int, typer.Option(help="Number of slots.")] = 8,
    json: Json = False,
) -> None:
    """Count what a pack's adapters take on a device: in slots of vLLM or SGLang, and as they are.

    Example: lotr serve-plan a-pack --max-loras 4
    """
    with progress_bar("counting"):
        plan = Pack(path).serve_plan(max_lora_rank, max_loras)
    if json:
        print_json(dict(plan._asdict()))
        return
    console = output_console()
    console.print(
        f"{plan.max_loras} slots of rank {plan.max_lora_rank} over {plan.modules} modules, 16 bit: "
        f"{size(plan.slot_bytes)}; for the originals, of rank {plan.original_rank}: "
        f"{size(plan.original_slot_bytes)}"
    )
    if not plan.fits:
        console.print(
            f"the unpacked adapters have ranks up to {plan.unpacked_rank} and do not fit: raise "
            f"--max-lora-rank, or unpack with --rank {plan.max_lora_rank}"
        )
    console.print(
        f"as the pack has them: {size(plan.base_bytes)} of bases once, and {size(plan.own_bytes)} "
        f"for {plan.max_loras} adapters"
    )


def check_pack(path: Path, *, json: bool) -> None:
    """Read every file of a pack, and decode every adapter in it."""
    with progress_bar("checking"):
        found = Pack(path)
        found.check()
    document = {"adapters": len(found.names), "bytes": found.bytes, "files": len(found.files)}
    if json:
        print_json(document)
        return
    output_console().print(
        f"{path}: {document['adapters']} adapters in {document['files']} files, all as written",
        markup=False,
    )
