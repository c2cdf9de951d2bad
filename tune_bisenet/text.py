"""How numbers of things are said, wherever they are."""


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `1,000 epochs`. For nouns whose plural adds an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
