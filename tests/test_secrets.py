"""Passwords in addresses: hidden wherever an address is shown or an error quotes one; ordinary text stays as it is."""

import pytest
from sqlalchemy import make_url

from tune_bisenet.storage import has_secret, is_ambiguous, one_line, redact

ADDRESSES = {
    "postgresql://me:pw@host/studies": "postgresql://me:***@host/studies",
    "postgresql+psycopg://me:pw@host:5432/studies": "postgresql+psycopg://me:***@host:5432/studies",
    "postgresql://me:p%40ss%2Fw@host/studies": "postgresql://me:***@host/studies",
    "postgresql://me:p@ss@host/studies": "postgresql://me:***@host/studies",
    "postgresql://me:p:w@host/studies": "postgresql://me:***@host/studies",
    "postgresql://:pw@host/studies": "postgresql://:***@host/studies",
    "postgresql://host/studies?user=me&password=pw": "postgresql://host/studies?user=me&password=***",
    "postgresql://host/studies?sslpassword=pw&sslmode=require": "postgresql://host/studies?sslpassword=***&sslmode=require",
    "mysql+pymysql://me:pw@host/studies": "mysql+pymysql://me:***@host/studies",
    "s3://KEY:pw@bucket/searches": "s3://KEY:***@bucket/searches",
    "s3://bucket/searches?access_key=pw&secret_key=pw&region=eu-central-1": (
        "s3://bucket/searches?access_key=***&secret_key=***&region=eu-central-1"
    ),
    "s3://bucket/x?X-Amz-Signature=pw": "s3://bucket/x?X-Amz-Signature=***",
    "abfs://bucket/x?sas_token=pw": "abfs://bucket/x?sas_token=***",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_of_an_address_all_but_the_password_is_shown(address: str) -> None:
    assert redact(address) == ADDRESSES[address]
    assert has_secret(address)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_found_in_a_text(address: str) -> None:
    text = f"cannot use --study {address} (see '{address}'), nor {address}"
    shown = ADDRESSES[address]
    assert redact(text) == f"cannot use --study {shown} (see '{shown}'), nor {shown}"


def test_what_is_hidden_stays_as_it_is() -> None:
    for shown in ADDRESSES.values():
        assert redact(shown) == shown
        assert not has_secret(shown)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the loss was no longer a number at epoch 2",
        "results/2026-03-01: r01, r02 @ 0.5",
        "/home/me@work/cityscapes:old/leftImg8bit",
        "sqlite:////srv/a:b@c/study.db",
        "sqlite:///study.db",
        "postgresql://host:5432/studies",
        "postgresql://me@host/studies",
        "s3://bucket/searches?region=eu-central-1&endpoint_override=http://127.0.0.1:9000",
        "see http://127.0.0.1:6006/#scalars, or write to me@example.org",
        "https://example.org/a:b@c",
        "--name a:b@c --seeds 1,2",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text
    assert not has_secret(text)


@pytest.mark.parametrize("password", ["p@ss", "p/w", "p?w", "p#w", "p w", "@", "/", "a@b@c"])
def test_a_character_that_ends_a_password_for_some_must_be_encoded(password: str) -> None:
    assert is_ambiguous(f"postgresql://me:{password}@host/studies")


def test_an_address_that_sqlalchemy_takes_a_password_from_is_ambiguous() -> None:
    address = "postgresql://host:5432/studies?user=me@work"
    assert make_url(address).password == "5432/studies?user=me"
    assert is_ambiguous(address)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:p%40s%2Fs!$&'()*+,;=:~._-w@host:5432/studies",
        "postgresql://me@host/studies",
        "sqlite:////srv/a:b@c@d/study.db",
        "s3://bucket/a@b:c@d",
    ],
)
def test_other_addresses_can_be_read_in_one_way_only(address: str) -> None:
    assert not is_ambiguous(address)


def test_an_error_is_told_in_its_first_line_or_by_its_name() -> None:
    assert one_line(OSError("no postgresql://me:pw@host\n(and more)")) == "no postgresql://me:***@host"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    error = RuntimeError("invalid data, perhaps")
    error.__cause__ = OSError("connection refused")
    assert one_line(error) == "connection refused"
