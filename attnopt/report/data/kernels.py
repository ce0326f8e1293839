"""The emitted kernels that ran, as text."""

from __future__ import annotations

from attnopt import ops
from attnopt.codegen.emit import kernel_folder


def launched_sources() -> dict[str, str]:
    """The sources of the kernels this process really launched, by key."""
    paths = {key: kernel_folder() / f"{key}.py" for key in ops.launches}
    return {key: path.read_text(encoding="utf-8") for key, path in paths.items() if path.exists()}
