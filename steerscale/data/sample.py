"""Text that ships with steerscale; see samples/README.md for origins and licences."""

from pathlib import Path

from steerscale.errors import DataError

PREFIX = "sample:"
"""`sample:german` stands for the files of the German sample wherever an input is named."""
LANGUAGES = {"german": "de"}


def sample_corpus(name: str = "german") -> list[Path]:
    """Files of a sample corpus, one paragraph a line. Raises DataError if there is none of that name."""
    if name not in LANGUAGES:
        raise DataError(f"there is no {PREFIX}{name}; there is {', '.join(PREFIX + known for known in LANGUAGES)}")
    return sorted((Path(__file__).parent / "samples").glob(f"*.{LANGUAGES[name]}.txt.xz"))
