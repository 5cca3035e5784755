"""Self-contained HTML pages: what the report on runs and the latent browser share. Torch-free."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path


def fill_template(template: str, parts: Mapping[str, str]) -> str:
    """Put each part where the template has its {{NAME}}, in one pass: a name in somebody's data is not taken for a place."""
    pieces = template.split("{{")
    return pieces[0] + "".join(parts[name] + after for name, after in (piece.split("}}", 1) for piece in pieces[1:]))


def script_hash(script: str) -> str:
    """The source that admits this one inline script in a content security policy."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
