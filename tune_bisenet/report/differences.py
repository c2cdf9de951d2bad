"""What differs between a row and its reference, setting by setting, and which rows differ in more than one thing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tune_bisenet.config import Run


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting of a row that is not that of its reference."""

    setting: str
    """As `optimizer lr`."""
    before: object
    after: object
    is_a_thing: bool
    """False for a setting that only one of two kinds has: it comes and goes with the kind."""

    @property
    def words(self) -> str:
        return f"{self.setting} {_value(self.before)} → {_value(self.after)}"


def differences(row: Run, reference: Run) -> tuple[Difference, ...]:
    """Leaf by leaf, all but name, seed and expectation, in the order of the fields."""
    before, after = _leaves(reference), _leaves(row)
    return tuple(
        Difference(
            setting=setting,
            before=before.get(setting),
            after=after.get(setting),
            is_a_thing=setting in before and setting in after,
        )
        for setting in dict.fromkeys([*before, *after])
        if before.get(setting) != after.get(setting)
    )


def _leaves(run: Run) -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in run.model_dump(exclude={"name", "seed", "expect"}).items():
        leaves |= {f"{name} {key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return leaves


def row_flags(rows: Mapping[str, Run]) -> dict[str, tuple[str, ...]]:
    """By row, whether it differs in more than one thing from its reference, else from the table's most common one."""
    references = {name: _reference(row) for name, row in rows.items()}
    baseline = Counter(name for name in references.values() if name).most_common(1)
    flags: dict[str, tuple[str, ...]] = {}
    for name, row in rows.items():
        reference = references[name] or (baseline[0][0] if baseline else name)
        found = differences(row, rows[reference]) if reference in rows else ()
        several = sum(difference.is_a_thing for difference in found) > 1
        words = ", ".join(difference.words for difference in found)
        flags[name] = (f"differs from {reference} in more than one thing: {words}",) if several else ()
    return flags


def _reference(row: Run) -> str | None:
    return (row.expect.over or row.expect.sooner_than) if row.expect else None


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
