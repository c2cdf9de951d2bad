"""What the cluster's tests share: a home with a token in it, and the project's folder to stand in."""

from pathlib import Path

import pytest
from files import ROOT


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the token that `ray get-auth-token --generate` would make; one stands in the project's folder."""
    home = tmp_path / "home"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0" * 64)
    token.chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(ROOT)
    return home
