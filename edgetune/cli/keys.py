"""`edgetune keys init|list|add|rotate|revoke|sign`: the keys that sign a repository and its bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import suggestion

from .arguments import AsJson, BundlePath, print_json
from .grouped_help import GroupedCommand

if TYPE_CHECKING:
    from edgetune.delivery.publish.external_keys import ExternalKey
    from edgetune.delivery.publish.key_folder import KeyFolder

app = typer.Typer(
    help="Make and replace the keys of a repository. Their passphrase is asked for, or in EDGETUNE_KEYS_PASSPHRASE.",
    no_args_is_help=True,
)

KeysPath = Annotated[Path, typer.Argument(metavar="KEYS", help="The folder of the keys.")]
Role = Annotated[
    str,
    typer.Argument(
        metavar="ROLE",
        help="root, targets, snapshot, timestamp, bundles, which signs bundles, bundles/NAME, which signs one, or "
        "bundles/NAME/ADAPTER, whose author may publish this adapter of it.",
    ),
]


Uri = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="Use a key that stays in a token or service, such as hsm:2?label=NAME or awskms:ARN, with --public-key.",
    ),
]
PublicKey = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The public half, a PEM file: with --uri, or alone if an author has the key."),
]


def open_keys(folder: Path) -> KeyFolder:
    """The folder of keys, whose passphrase is asked for when it is needed."""
    from edgetune.delivery.publish.key_files import passphrase_of_user
    from edgetune.delivery.publish.key_folder import KeyFolder

    return KeyFolder(folder, passphrase_of_user(folder))


@app.command(cls=GroupedCommand)
def init(
    keys: KeysPath,
    *,
    root_keys: Annotated[int, typer.Option(metavar="N", help="How many root keys to make.")] = 3,
    threshold: Annotated[int, typer.Option(metavar="M", help="How many of them must sign a change of keys.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Make the keys of a repository, in encrypted files.

    Give devices `1.root.json`. Keep the files root-*.pem in different places, none of them online: they only sign
    changes of keys. The others sign when you publish.
    """
    folder = open_keys(keys)
    folder.create(root_keys, threshold)
    _show(folder, as_json)


@app.command("list", cls=GroupedCommand)
def list_keys(keys: KeysPath, *, as_json: AsJson = False) -> None:
    """List the trusted keys of each role, and whether their private halves are in the folder."""
    _show(open_keys(keys), as_json)


@app.command(cls=GroupedCommand)
def add(keys: KeysPath, role: Role, *, uri: Uri = None, public_key: PublicKey = None, as_json: AsJson = False) -> None:
    """Make another key for a role; publish again so that devices learn of it.

    After the first key for bundles/NAME, only keys of that role sign this bundle. Someone with no other bundles key can
    publish this bundle only; someone with just a key for bundles/NAME/ADAPTER can publish that adapter only.
    """
    folder = open_keys(keys)
    folder.add(role if role.startswith("bundles/") else _checked_role(role, folder), _external(role, uri, public_key))
    _show(folder, as_json)


@app.command(cls=GroupedCommand)
def rotate(
    keys: KeysPath, role: Role, *, uri: Uri = None, public_key: PublicKey = None, as_json: AsJson = False
) -> None:
    """Make a key in place of the oldest one of a role; publish again so that devices learn of it."""
    folder = open_keys(keys)
    folder.rotate(_checked_role(role, folder), _external(role, uri, public_key))
    _show(folder, as_json)


@app.command(cls=GroupedCommand)
def revoke(
    keys: KeysPath,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The first digits of the key's id.")],
    *,
    role: Annotated[
        str | None, typer.Option(metavar="ROLE", help="The role that loses it (default: the only one that has it).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stop trusting a key; publish again so that devices learn of it."""
    folder = open_keys(keys)
    folder.revoke(key, None if role is None else _checked_role(role, folder))
    _show(folder, as_json)


@app.command(cls=GroupedCommand)
def sign(keys: KeysPath, bundle: BundlePath) -> None:
    """Sign a bundle that is not published, for `edgetune-run --trusted-keys KEYS/trusted-keys.json`."""
    from edgetune.delivery.publish.publish import sign as sign_bundle

    print(sign_bundle(bundle, open_keys(keys)))


def _checked_role(role: str, folder: KeyFolder) -> str:
    if role not in folder.roles:
        raise UsageError(f"there is no role {role!r}", suggestion(role, folder.roles))
    return role


def _external(role: str, uri: str | None, public_key: Path | None) -> ExternalKey | None:
    """The key of --uri and --public-key for a role; None without them."""
    from edgetune.delivery.publish.external_keys import external_key
    from edgetune.delivery.publish.key_folder import is_of_author

    if uri is None and public_key is None:
        return None
    if public_key is None or (uri is None and not is_of_author(role)):
        raise UsageError("--uri and --public-key belong together", "give both")
    external = external_key(uri, public_key)
    if external.key.keytype != "ed25519":
        print("edgetune: devices need the package cryptography to verify signatures of this key", file=sys.stderr)
    return external


def _show(folder: KeyFolder, as_json: bool) -> None:
    rows = folder.listing()
    if as_json:
        print_json(rows)
        return
    for row in rows:
        where = row["file"] if row["is_here"] else f"{row['file']} (elsewhere)"
        print(f"{row['role']}\t{row['key'][:8]}\t{row['threshold']} must sign\t{where}")
