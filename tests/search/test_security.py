"""What a search shows to others: Ray listens on this machine alone and asks for a token, and secrets reach no file."""

import ipaddress
import re
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.processes import Driver, Process, end_process, environment
from helpers.searches import make_place, on_frames, statuses, write_sampled_space

from tune_bisenet.options import STUDY_VARIABLE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]

PASSWORD = "planted-password"
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "PLANTEDACCESSKEYID",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-access-key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_plantedtoken",
}

STRANGER = """
import sys
import ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # or Ray takes 127.0.0.1 for this machine's other address
ray.init(address=sys.argv[1])
print(len(ray.nodes()), "nodes seen")
"""

place = pytest.fixture(scope="module")(make_place)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a search while it trained, and where it left its files."""

    folder: Path
    listeners: frozenset[tuple[str, str]]
    """Processes by name, with the addresses they listen on."""
    friend: str
    """What Ray told someone who has the token."""
    stranger: str
    """What it told someone who has none."""

    @property
    def token(self) -> Path:
        return self.folder.parent / "home" / ".ray" / "auth_token"


@pytest.fixture(scope="module")
def search(place: Path) -> Seen:
    """A sampled search with secrets in its environment and in the address of its study."""
    (place / "home").mkdir()
    write_sampled_space(place / "space.py", num_epochs=3)
    variables = VARIABLES | {"HOME": str(place / "home")}
    study = f"sqlite:///file:{place}/study.db?uri=true&password={PASSWORD}"
    flags = [*on_frames(place), "--trials", "2", "--name", "kept"]
    with Driver(place, *flags, variables=variables | {STUDY_VARIABLE: study}) as driver:
        driver.until(lambda: bool(driver.trainers()))
        halted = driver.trainers()
        for pid in halted:  # so that the search does not end meanwhile
            end_process(pid, signal.SIGSTOP)
        address = next(found[1] for p in driver.processes() if (found := re.search(r"--gcs-address=(\S+)", p.title)))
        seen = Seen(
            folder=place / "kept",
            listeners=listeners(driver.processes()),
            friend=join(place, address, home=place / "home"),
            stranger=join(place, address, home=place / "nowhere"),
        )
        for pid in halted:
            end_process(pid, signal.SIGCONT)
        assert driver.end() == 0
    return seen


def listeners(processes: list[Process]) -> frozenset[tuple[str, str]]:
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _number, local, _remote, state, *others = line.split()
            if state == "0A":  # listens
                addresses[f"socket:[{others[5]}]"] = parse_address(local.partition(":")[0])
    found = set()
    for process in processes:
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if (address := addresses.get(str(file.readlink()))) is not None:
                    found.add((process.title.split()[0].rpartition("/")[2], address))
    return frozenset(found)


def parse_address(text: str) -> str:
    """Return the address that the kernel prints as words of four bytes, each with its last byte first."""
    content = b"".join(bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8))
    address = ipaddress.ip_address(content)
    return str(getattr(address, "ipv4_mapped", None) or address)


def join(place: Path, address: str, *, home: Path) -> str:
    joined = subprocess.run(
        [sys.executable, "-c", STRANGER, address],
        env=environment(place) | {"HOME": str(home), "RAY_AUTH_MODE": "token" if home.exists() else "disabled"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return joined.stdout + joined.stderr


def test_ray_listens_on_this_machine_alone(search: Seen) -> None:
    assert {"gcs_server", "raylet"} <= {name for name, _ in search.listeners}
    others = {(name, address) for name, address in search.listeners if not ipaddress.ip_address(address).is_loopback}
    assert not others


def test_ray_asks_for_a_token_that_only_this_user_can_read(search: Seen) -> None:
    assert "1 nodes seen" in search.friend
    assert "nodes seen" not in search.stranger
    assert re.search(r"[Uu]nauthenticated|InvalidAuthToken|AuthenticationError", search.stranger)
    assert stat.S_IMODE(search.token.stat().st_mode) == 0o600


def test_no_secret_is_in_any_file(search: Seen) -> None:
    """Not in the results with their page, nor in the study, the cache, the terminal's text or Ray's logs."""
    assert set(statuses(search.folder).values()) == {"finished"}
    files = [path for path in search.folder.parent.rglob("*") if path.is_file() and path != search.token]
    names = {path.name for path in files}
    assert {"report.html", "search.json", "study.db", "train.arrow", "gcs_server.out", "raylet.out"} <= names
    secrets = (PASSWORD, search.token.read_text().strip(), *VARIABLES.values())
    assert all(secrets)
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
