"""Whatever bytes lie where a state should: it is restored, or a CheckpointError says why not. Nothing in it is run."""

import hashlib
import io
import pickle
import sys
import zipfile
from typing import Any

import pytest
import torch
from helpers.fuzz import ODD_VALUES, damaged, inputs
from hypothesis import given
from hypothesis import strategies as st

from tune_bisenet.training.checkpoint import FORMAT, CheckpointError, from_bytes, to_bytes

STATE = {
    "format": FORMAT,
    "identity": "one",
    "model": {"weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "history": [{"epoch": 1, "miou": float("nan"), "iou": (None, 3.0)}],
}
SAVED = to_bytes(STATE)
ARCHIVE = SAVED[: -hashlib.sha256().digest_size]

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "shutil.rmtree", "os.remove")
_is_watching = False


def _watch(event: str, _arguments: tuple[Any, ...]) -> None:
    if _is_watching and event in FORBIDDEN:
        raise AssertionError(f"{event} was called")


sys.addaudithook(_watch)


def with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def repacked(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


MEMBERS = members()
PICKLE = next(name for name in MEMBERS if name.endswith("/data.pkl"))
CALLABLES = [
    b"cos\nsystem\n",
    b"cposix\nsystem\n",
    b"cbuiltins\nexec\n",
    b"cbuiltins\neval\n",
    b"cshutil\nrmtree\n",
    b"csubprocess\nPopen\n",
    b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"cbuiltins\ngetattr\n",
]
PIECES = [
    *CALLABLES,
    *(bytes([code]) for code in b"().]}NKMGRbdeioqrstu0125aehjlp"),
    b"U\x04true",
    b"V/tmp/x\n",
    b"K\x01",
    pickle.NEWOBJ,
    pickle.STACK_GLOBAL,
    pickle.BUILD,
    pickle.BINPERSID,
    pickle.MARK,
]


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Return an archive that is damaged, or whose pickle is damaged, of random code, or of other plain values."""
    match draw(st.sampled_from(["bytes", "pickle", "code", "call", "values"])):
        case "bytes":
            return draw(damaged(ARCHIVE))
        case "pickle":
            return repacked(MEMBERS | {PICKLE: draw(damaged(MEMBERS[PICKLE]))})
        case "code":
            code = b"".join(draw(st.lists(st.sampled_from(PIECES), max_size=24)))
            return repacked(MEMBERS | {PICKLE: b"\x80\x02" + code + b"."})
        case "call":
            call = draw(st.sampled_from(CALLABLES)) + draw(st.sampled_from([b"(Vtrue\ntR", b"(Vtrue\nK\x01tR", b"(tR"]))
            cut = draw(st.integers(2, len(MEMBERS[PICKLE]) - 1))
            return repacked(MEMBERS | {PICKLE: MEMBERS[PICKLE][:cut] + call + b"0" + MEMBERS[PICKLE][cut:]})
        case _:
            values = draw(ODD_VALUES)
            return to_bytes({**STATE, **values} if isinstance(values, dict) else values)[:-32]


@inputs(40)
@given(content=damaged(SAVED))
def test_a_damaged_state_is_never_taken_for_what_was_saved(content: bytes) -> None:
    if content == SAVED:
        assert from_bytes(content)["identity"] == "one"
        return
    with pytest.raises(CheckpointError):
        from_bytes(content)


@inputs(120)
@given(content=archives())
def test_a_state_with_a_right_checksum_holds_plain_values_or_is_refused(content: bytes) -> None:
    global _is_watching
    _is_watching = True
    try:
        state = from_bytes(with_checksum(content))
    except CheckpointError as error:
        assert "weights_only" not in str(error), "torch's advice is to run the code"
    else:
        assert state["format"] == FORMAT
    finally:
        _is_watching = False
