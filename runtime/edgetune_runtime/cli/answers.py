"""The commands about a bundle: what is in it, and its answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgetune_runtime import engines
from edgetune_runtime.bundle import (
    ERROR,
    AdapterEntry,
    Manifest,
    RouterEntry,
    bytes_of_model,
    read_manifest,
    verify_files,
)
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.inference.opening_options import OpeningOptions, context_mb, decide
from edgetune_runtime.processes.child_process import MAX_S
from edgetune_runtime.processes.confinement import confine, limits_of
from edgetune_runtime.sizing.needs import needs_of_bundle
from edgetune_runtime.wording import printable

from .conversation import Conversation, adapter_choice, say_unsure, show
from .options import answer_options, open_runtime, opening_options, prompt_of

_REPORT_BYTES = 1 << 20


def info(options: argparse.Namespace) -> None:
    """`info`: what is in the bundle, and how it would be opened here; loads no weights."""
    manifest = read_manifest(options.bundle)
    opening = decide(manifest, **opening_options(options))
    if options.verify:
        verify_files(options.bundle, manifest)
    if options.json:
        print(manifest.to_json(), end="")
        return
    base = manifest.base
    whole = _megabytes(entry.bytes for entry in manifest.files.values())
    weights = f"{base.parameters / 1e6:.0f} M parameters, {base.types_in(next(iter(base.files)))}"
    lines = [
        f"bundle    {manifest.name}, {whole}, context {manifest.context_length} tokens",
        f"base      {base.name}: {base.architecture}, {weights}, {_size(manifest, base.files.values())}",
    ]
    for entry in manifest.adapters.values():
        shapes = " and ".join(dict.fromkeys(entry.shapes.values()))
        lines.append(f"adapter   {entry.name}: {entry.method}, {shapes}, {_size(manifest, entry.files.values())}")
        lines += [f"          {line}" for line in _sureness_lines(entry)]
    lines += [] if manifest.router is None else _router_lines(manifest.router)
    lines.append(f"opening   {_described(manifest, opening)}{_recurrence(options.bundle, opening)}")
    print("\n".join(map(printable, lines)))


def _sureness_lines(entry: AdapterEntry) -> Iterator[str]:
    """Which answers of an adapter have a confidence, and what becomes of unsure ones and of texts out of scope."""
    curves = [(kind, curve) for kinds in entry.confidence.values() for kind, curve in kinds.items()]
    if fitted := dict.fromkeys(kind for kind, curve in curves if curve.slope is not None):
        yield f"confidence of answers of the kind {', '.join(fitted)}"
    if (rule := entry.unsure) is not None:
        yield f"unsure below {rule.min_confidence:g}: {rule.then}"
    for name, scope in entry.scope.items():
        yield f"{scope.label} in {name}: {scope.found:.0%} of texts out of scope, {scope.refused:.0%} of the others"


def _router_lines(router: RouterEntry) -> list[str]:
    """How `--adapter auto` chooses."""
    other = "refused" if router.below == ERROR else f"answered by {router.below}"
    return [
        f"router    {call} chooses among {', '.join(routed.adapters)}; other prompts (below {routed.threshold:g}, "
        f"{routed.none_found:.0%} are found) are {other}"
        for call, routed in router.calls.items()
    ]


def _described(manifest: Manifest, opening: OpeningOptions) -> str:
    """What is decided of the options of opening a bundle."""
    threads = f"{opening.threads} thread{'s' if opening.threads > 1 else ''}"
    text = f"engine {opening.engine}, {threads} ({opening.priority}), context {opening.context_length} tokens"
    if opening.kv is None:
        return text
    return f"{text}, KV cache {opening.kv}, {context_mb(manifest, opening):.1f} MB each"


def _recurrence(bundle: Path, opening: OpeningOptions) -> str:
    """The recurrent states of the base, if it has any, and whether there are drafts."""
    if opening.kv is None or opening.engine not in engines.names_with_needs():
        return ""
    needs = needs_of_bundle(bundle, context_length=opening.context_length, engine=opening.engine)
    if not needs.recurrent_bytes:
        return ""
    drafts = "" if needs.max_rollback else ", no drafts because rejected tokens could not be dropped"
    return f", recurrent states {needs.recurrent_bytes / 1e6:.1f} MB each{drafts}"


def _size(manifest: Manifest, names: Iterable[str]) -> str:
    return _megabytes(bytes_of_model(manifest.files, name) for name in names)


def _megabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:.1f} MB"


def generate(options: argparse.Namespace) -> None:
    """`generate`: the answer to one prompt, as it is generated."""
    prompt = prompt_of(options)
    with open_runtime(options) as runtime:
        stream = runtime.stream(prompt, adapter=adapter_choice(runtime, options.adapter), **answer_options(options))
        show(stream, as_json=options.json)


def classify(options: argparse.Namespace) -> None:
    """`classify`: the labels that were computed, with their probabilities."""
    prompt = prompt_of(options)
    labels = None if options.labels is None else [label.strip() for label in options.labels.split(",")]
    with open_runtime(options) as runtime:
        classification = runtime.classify(
            prompt,
            labels,
            adapter=adapter_choice(runtime, options.adapter),
            exact=options.exact,
            min_confidence=options.min_confidence,
        )
    label, probabilities = classification
    if options.json:
        values = {"label": label, "scores": probabilities, "unseen": classification.unseen}
        values |= {
            "out_of_scope": classification.is_out_of_scope,
            "confidence": classification.confidence,
            "is_unsure": classification.is_unsure,
        }
        values |= {} if classification.route is None else {"route": asdict(classification.route)}
        print(json.dumps(values, ensure_ascii=False))
        return
    # The label of texts that are out of scope comes first, whatever its own probability.
    rows = {label: 0.0, **probabilities}
    for name in sorted(rows, key=lambda name: (name == label, rows[name]), reverse=True):
        print(f"{printable(name)}\t{rows[name]:.4f}")
    if classification.is_unsure:
        say_unsure(classification.confidence)


def chat(options: argparse.Namespace) -> None:
    """`chat`: read messages and answer them, until the input ends."""
    with open_runtime(options) as runtime:
        Conversation(runtime, options.adapter, answer_options(options), as_json=options.json).run()


def check(options: argparse.Namespace) -> None:
    """`check`: compare golden answers of the build with those of this machine."""
    more = _confined(options) if options.confined else {}
    from edgetune_runtime.inference.golden import report  # noqa: PLC0415 - see open_runtime, and it starts threads

    with open_runtime(options, **more) as runtime:
        if not options.no_verify:
            # Opening reads only the files that it needs.
            verify_files(options.bundle, runtime.manifest)
        report(runtime, as_json=options.json)


def _confined(options: argparse.Namespace) -> dict[str, Any]:
    """Confine this process; the options of `Runtime.open` that go with it."""
    manifest = read_manifest(options.bundle)
    limits = limits_of(manifest, options.context_length or manifest.context_length)
    # Long answers of many adapters, and a report that goes to a file.
    confine(replace(limits, time_s=MAX_S, file_bytes=_REPORT_BYTES))
    return {"contexts": 1, "disk_mb": 0, "preflight": False}


def warm(options: argparse.Namespace) -> None:
    """`warm`: compute and save the states of fixed prompts."""
    from edgetune_runtime.inference.measuring import loaded_bundle  # noqa: PLC0415 - see open_runtime

    with open_runtime(options) as runtime:
        tokens = runtime.warm()
        unsaved = loaded_bundle(runtime).base.first.shared.unsaved
    if unsaved:
        # A warning has said why.
        message = f"{len(unsaved)} of the states are not saved"
        raise EdgetuneError(message, "give --cache-folder, a folder with space that you may write to")
    if options.json:
        print(json.dumps(tokens, ensure_ascii=False))
        return
    for name, count in tokens.items():
        print(f"{name}\t{count} tokens")
