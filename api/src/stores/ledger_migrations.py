"""The numbered SQL scripts under migrations/, one folder per database. Owns finding them; writers run them."""

from __future__ import annotations

from importlib.resources import files


def scripts_after(database: str, version: int) -> dict[int, str]:
    """The scripts of `database` (a folder) that a store of schema `version` has not seen, by number, in order.

    Raises RuntimeError for a store that a newer version of this server has migrated.
    """
    found = sorted((files(__package__) / "migrations" / database).iterdir(), key=lambda script: script.name)
    numbered = {int(script.name[:4]): script for script in found if script.name.endswith(".sql")}
    if version > max(numbered):
        raise RuntimeError(f"The ledger has schema {version}; this version knows {max(numbered)}.")
    return {number: script.read_text("utf-8") for number, script in numbered.items() if number > version}
