"""The commands by name: each is imported when it is called, and help lists them without that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lotrtensor.interrupts import end_as_usual, end_while_loading

COMMANDS = {
    "inspect": (
        "inspect",
        "Show what an adapter holds: groups, shapes, ranks, errors, sizes, singular values; or a "
        "pack.",
    ),
    "convert": (
        "convert",
        "Convert a trained LoRA into LoTR form, and say exactly what was lost.",
    ),
    "compress": (
        "compress",
        "Compress an adapter into one small file, its bits spent where they reduce the error most.",
    ),
    "calibrate": (
        "calibrate",
        "Measure on a text which errors of an adapter its model's outputs see, for lotr compress.",
    ),
    "heal": (
        "calibrate",
        "Fit the values of a compressed adapter's terms to what the original makes of a text.",
    ),
    "truncate": (
        "truncate",
        "Lower the ranks of an adapter: a LoRA stays a LoRA, a LoTR a LoTR.",
    ),
    "export": ("export", "Write a LoTR adapter as a portable LoRA: alpha = r, scale baked in."),
    "analyze": (
        "analyze",
        "Compare LoTR and truncated LoRA at every size, and adapters with one another.",
    ),
    "verify": (
        "verify",
        "Compare the weight updates of two adapters, module by module; or of a pack and its "
        "originals.",
    ),
    "check": (
        "check",
        "Compare every tensor of an adapter with its checksum; of a pack, decode every adapter "
        "too.",
    ),
    "extract": ("extract", "Fit an adapter to the difference of two checkpoints, slice by slice."),
    "merge": (
        "merge",
        "Write base + ΔW as a checkpoint, shard by shard, every tensor in its own type.",
    ),
    "pack": (
        "packs",
        "Pack adapters of one base model: what they share once, what is their own in bits.",
    ),
    "add": (
        "packs",
        "Add adapters to a pack, all or none; no file that stands there is written again.",
    ),
    "remove": ("packs", "Remove adapters from a pack."),
    "refit": ("packs", "Fit the bases of a pack anew, for the adapters that it holds by now."),
    "unpack": (
        "packs",
        "Write one adapter of a pack as a portable LoRA, without reading the others.",
    ),
    "serve-plan": (
        "packs",
        "Count what a pack's adapters take on a device: in slots of vLLM or SGLang, and as they "
        "are.",
    ),
    "demo": (
        "demo",
        "Convert the bundled trained adapter, write it, export it back, and verify both.",
    ),
}
"""Module of this package and first sentence of every command, in the order of the help."""


class Commands(TyperGroup):
    """A group whose commands are imported when they are called; lists show their first sentence."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, summary) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=summary)
        self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, imported; while commands are listed, its name and summary alone."""
        if self._listing or cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        return _imported(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, which lists the commands."""
        with self._list():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the names that a word can become."""
        with self._list():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _list(self) -> Iterator[None]:
        self._listing = True
        try:
            yield
        finally:
            self._listing = False


def _imported(name: str) -> Any:
    end_while_loading()  # nothing is begun yet, and imports do not bear an interrupt
    module = import_module(f"lotrtensor.cli.{COMMANDS[name][0]}")
    end_as_usual()
    alone = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )
    alone.command(name)(getattr(module, name.replace("-", "_")))
    return typer.main.get_command(alone)
