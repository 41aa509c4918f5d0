"""Where a model's folder keeps its chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconv.errors import CheckpointError

TEMPLATE_NAME = "chat_template.jinja"
ADDITIONAL_FOLDER = "additional_chat_templates"
"""Holds ``NAME.jinja`` for every template beside the default one."""
DEFAULT = "default"
_HINT = "Download it again."


def templates_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """All chat templates of a folder by name, the default one first; files of their own go before any other.

    Args:
        folder: The model's folder.
        settings: What tokenizer_config.json holds.

    Raises:
        CheckpointError: one cannot be read or is malformed.
    """
    files = {DEFAULT: folder / TEMPLATE_NAME} | {path.stem: path for path in additional_files(folder)}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    if found:
        return found
    match settings.get("chat_template"):
        case None:
            return {}
        case str(template):
            return {DEFAULT: template}
        case list(several) if all(map(_is_named_template, several)):
            return {entry["name"]: entry["template"] for entry in several}
    raise CheckpointError(
        f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of named ones.", hint=_HINT
    )


def additional_files(folder: Path) -> list[Path]:
    """The files of the templates beside the default one, sorted; links that lead nowhere too."""
    return sorted(path for path in (folder / ADDITIONAL_FOLDER).glob("*.jinja") if not path.is_dir())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot read: {error}.", hint=_HINT) from error


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
