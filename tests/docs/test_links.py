"""Links of README and of the other pages that GitHub shows lead to files that there are."""

from __future__ import annotations

import re

import pytest

from tests.docs.console import CHECKOUT

_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "kernels/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = CHECKOUT / page
    for link in _LINK.findall(path.read_text()):
        if not link.startswith(("http://", "https://")):
            assert (path.parent / link).exists(), f"{page}: {link}"


EVERYDAY = {"help", "install", "lint", "clean"}
"""Targets that need no words."""


def test_the_readme_names_every_target_of_make() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    targets = re.findall(r"^([a-z-]+):.*?  ## ", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 20
    missing = [
        name for name in targets if name not in EVERYDAY and f"`{name}`" not in readme and f"make {name} " not in readme
    ]
    assert missing == []
