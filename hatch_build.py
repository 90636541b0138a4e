"""What a wheel holds beside the package, the reader's notebooks and the tables, and addresses from one setting."""

import re
import sys
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "book/_tools"))


def readme(text: str, repository: str) -> str:
    """The README for a place outside of the repository: its links and pictures lead there, or are left out."""

    def outside(found: re.Match) -> str:
        picture, words, path = found.groups()
        if not repository:
            return "" if picture else words
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:)([^)]+)\)", outside, text)


class MetadataHook(MetadataHookInterface):
    """The README and the addresses."""

    def update(self, metadata: dict) -> None:
        import settings_of_book as settings

        repository = settings.repository(ROOT)
        text = readme((ROOT / "README.md").read_text("utf-8"), repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if repository:
            metadata["urls"] = {
                "Book": settings.site(repository),
                "Source": repository,
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            }


class BuildHook(BuildHookInterface):
    """The notebooks and the tables; an editable install finds them in the repository."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        import editions

        folder = Path(tempfile.mkdtemp())
        editions.write(folder, "reader")
        build_data["force_include"] |= {str(folder): "vaelib/book", str(ROOT / "results"): "vaelib/results"}
