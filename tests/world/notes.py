"""Reads the teacher's notes on images."""


def names_in_note(note: str) -> list[str]:
    """The names in a note that lists an image; any other note counts as one name."""
    return note.partition(": ")[2].removesuffix(".").split(", ")
