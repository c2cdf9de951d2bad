"""Text: passwords in addresses are never shown, ordinary text stays as it is."""

import pytest
from sqlalchemy import make_url

from tune_bisenet.text import has_secret, is_ambiguous, one_line, redact

WITH_PASSWORD = [
    "postgresql+psycopg://me:{}@host:5432/studies",
    "postgresql://:{}@host/studies",
    "postgresql://host/studies?sslpassword={}&sslmode=require",
    "s3://bucket/searches?access_key={0}&secret_key={0}&region=eu-central-1",
    "s3://bucket/x?X-Amz-Signature={}",
    "abfs://bucket/x?sas_token={}",
]


@pytest.mark.parametrize("template", WITH_PASSWORD)
def test_only_the_password_of_an_address_is_hidden(template: str) -> None:
    address, shown = template.format("p%40s%2Fw"), template.format("***")
    text = "cannot use --study {0} (see '{0}'), nor {0}"
    assert redact(text.format(address)) == text.format(shown)
    assert has_secret(address)
    assert redact(shown) == shown
    assert not has_secret(shown)


@pytest.mark.parametrize("password", ["p@ss", "p:w"])
def test_passwords_that_should_have_been_encoded_are_hidden(password: str) -> None:
    assert redact(f"postgresql://me:{password}@host/studies") == "postgresql://me:***@host/studies"


WITHOUT_PASSWORD = [
    "results/2026-03-01: r01, r02 @ 0.5",
    "/home/me@work/cityscapes:old/leftImg8bit --name a:b@c --seeds 1,2",
    "sqlite:////srv/a:b@c/study.db",
    "postgresql://me@host:5432/studies",
    "s3://bucket/searches?region=eu-central-1&endpoint_override=http://127.0.0.1:9000",
    "see http://127.0.0.1:6006/#scalars or https://example.org/a:b@c, or write to me@example.org",
]


@pytest.mark.parametrize("text", WITHOUT_PASSWORD)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text
    assert not has_secret(text)


@pytest.mark.parametrize("password", ["p@ss", "p/w", "p?w", "p#w", "p w", "@", "/", "a@b@c"])
def test_characters_that_end_a_password_must_be_encoded(password: str) -> None:
    assert is_ambiguous(f"postgresql://me:{password}@host/studies")


def test_an_address_that_sqlalchemy_takes_a_password_from_is_ambiguous() -> None:
    address = "postgresql://host:5432/studies?user=me@work"
    assert make_url(address).password == "5432/studies?user=me"
    assert is_ambiguous(address)
    assert not is_ambiguous("postgresql://me:p%40s%2Fs!$&'()*+,;=:~._-w@host:5432/studies")
    assert not is_ambiguous("sqlite:////srv/a:b@c@d/study.db")


def test_an_error_is_shown_by_its_first_line_or_its_name() -> None:
    assert one_line(OSError("no postgresql://me:pw@host\n(and more)")) == "no postgresql://me:***@host"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    error = RuntimeError("invalid data, perhaps")
    error.__cause__ = OSError("connection refused")
    assert one_line(error) == "connection refused"
