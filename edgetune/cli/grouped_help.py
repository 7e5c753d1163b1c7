"""Commands whose plain-text --help groups options by Typer's rich_help_panel, and that take an option once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from edgetune_runtime.errors import UsageError
from typer.core import TyperCommand, TyperGroup, TyperOption


class GroupedCommand(TyperCommand):
    """A command whose options are listed by panel; one that has a single value can be given once."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """As Typer does; UsageError for an option with a single value that is given twice."""
        *_, given = self.make_parser(ctx).parse_args(list(args))
        options = [part for part in given if isinstance(part, TyperOption) and not (part.multiple or part.is_flag)]
        twice = next((option for option in options if options.count(option) > 1), None)
        if twice is not None and not ctx.resilient_parsing:
            raise UsageError(f"{max(twice.opts, key=len)} is given twice", "give it once")
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The names of arguments without the braces and second brackets that Typer puts around them."""
        marks = {"{": "", "}": "", "[[": "[", "]]": "]"}
        pieces = super().collect_usage_pieces(ctx)
        for mark, shown in marks.items():
            pieces = [piece.replace(mark, shown) for piece in pieces]
        return pieces

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Write a section for each panel, in the order of the panels' first options."""
        records = ((_panel(parameter), parameter.get_help_record(ctx)) for parameter in self.get_params(ctx))
        _write_sections(formatter, records)


class GroupedGroup(TyperGroup):
    """A group whose commands are listed by panel."""

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Write a section for each panel, in the order of the panels' first commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        limit = formatter.width - 6 - max(len(name) for name, _ in commands)
        records = (
            (_panel(command, "Commands"), (name, command.get_short_help_str(limit)))
            for name, command in commands
            if command is not None and not command.hidden
        )
        _write_sections(formatter, records)


def _panel(part: Any, default: str = "Options") -> str:  # noqa: ANN401 - Typer's parameters share no public class
    named = getattr(part, "rich_help_panel", None)
    if isinstance(named, str):
        return named
    return "Arguments" if getattr(part, "param_type_name", "") == "argument" else default


def _write_sections(formatter: Any, records: Iterable[tuple[str, tuple[str, str] | None]]) -> None:  # noqa: ANN401
    sections: dict[str, list[tuple[str, str]]] = {}
    for title, record in records:
        if record is not None:
            # Typer adds the Python type of arguments.
            sections.setdefault(title, []).append((record[0].partition(" <")[0], record[1]))
    for title, lines in sections.items():
        with formatter.section(title):
            formatter.write_dl(lines)
