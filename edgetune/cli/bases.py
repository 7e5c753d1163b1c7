"""`edgetune bases`: the architectures with their formats and methods, and published weights, on standard output."""

from __future__ import annotations

from dataclasses import asdict

from .arguments import AsJson, print_json
from .tables import print_columns


def bases(*, as_json: AsJson = False) -> None:
    """List the bases that can be trained.

    Shows each architecture with the methods that each format can hold (- means that the format does not support it),
    and published weights with their license, their size on a board, and the formats in which they were tried. How to
    get them is in docs/bases.md.
    """
    from edgetune.base_list import tables
    from edgetune.base_list.facts import decoders, encoders, published

    if as_json:
        of_decoders = {name: asdict(facts) for name, facts in decoders().items()}
        weights = {item.hub_id: item.to_json() for item in published()}
        print_json({"architectures": of_decoders, "encoders": asdict(encoders()), "weights": weights})
        return
    print_columns([tables.ARCHITECTURES, *tables.architecture_rows()])
    print()
    print_columns([tables.WEIGHTS, *tables.weights_rows()])
