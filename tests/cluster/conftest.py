"""What the cluster's tests share: a place for searches, a home with a token, and a cloud."""

from pathlib import Path

import clouds
import pytest
from files import ROOT
from helpers.searches import make_place

place = pytest.fixture(scope="module")(make_place)
cloud = pytest.fixture(clouds.serve)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home with the token of `ray get-auth-token --generate`, and work in the project's folder."""
    home = tmp_path / "home"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0" * 64)
    token.chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(ROOT)
    return home
