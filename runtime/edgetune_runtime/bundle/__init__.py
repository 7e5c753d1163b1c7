"""A bundle: its manifest and the check of its files, the contract between the build host and the board.

A bundle is a folder of plain files and `manifest.json`, which lists each file with its digest and ties the adapters to
the base that they were trained on. Standard library only, so that a board can read it before an engine is installed.
"""

from .files import (
    VerifiedFiles,
    bytes_of_model,
    digest_of_model,
    entry_of,
    files_beside,
    files_of,
    files_of_format,
    of_formats,
    pinned,
    resolve,
    sha256_of,
    unchanged,
    verify_files,
    with_present_formats,
    without_adapter,
)
from .parts import read_manifest
from .reading import parse_manifest
from .records import (
    ASK,
    AUTO,
    BASE,
    CLASSIFICATION,
    CLASSIFY,
    DEFER,
    ERROR,
    GENERATE,
    GENERATION,
    LONGEST_MANIFEST,
    MANIFEST_NAME,
    MARK,
    ROUTER_WORDS,
    SCHEMA_VERSION,
    STATES_FOLDER,
    TASKS,
    AdapterEntry,
    BaseEntry,
    ConfidenceCurve,
    FileEntry,
    GoldenAnswer,
    Manifest,
    NewAdapter,
    RoutedCall,
    RouterEntry,
    Scope,
    UnsureRule,
)

__all__ = [
    "ASK", "AUTO", "BASE", "CLASSIFICATION", "CLASSIFY", "DEFER", "ERROR", "GENERATE", "GENERATION",
    "LONGEST_MANIFEST", "MANIFEST_NAME", "MARK", "ROUTER_WORDS", "SCHEMA_VERSION", "STATES_FOLDER", "TASKS",
    "AdapterEntry", "BaseEntry", "ConfidenceCurve", "FileEntry", "GoldenAnswer", "Manifest", "NewAdapter", "RoutedCall",
    "RouterEntry", "Scope", "UnsureRule", "VerifiedFiles", "bytes_of_model", "digest_of_model", "entry_of",
    "files_beside", "files_of", "files_of_format", "of_formats", "parse_manifest", "pinned", "read_manifest", "resolve",
    "sha256_of", "unchanged", "verify_files", "with_present_formats", "without_adapter",
]  # fmt: skip
