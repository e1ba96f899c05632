"""Key files for tests, written by the command that users write theirs with."""

from pathlib import Path

import pytest
from millrace.cli.keys import create_key


def new_key(
    capsys: pytest.CaptureFixture[str], path: Path, tenant: str, *scopes: str, **limits: float
) -> str:
    """A key that is shown once."""
    capsys.readouterr()
    create_key(path, tenant, scopes or ("generate",), limits, as_json=False)
    return capsys.readouterr().out.strip()
