"""What an installation brings along, and under which licences; exits with 1 at one to look at.

    python -m tests.release.licences

The dependencies of adarank-fast without its extras, and theirs, as installed here.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

PERMISSIVE = re.compile(
    r"apache|\bmit\b|\bbsd|\b[023]-clause|\bisc\b|mpl|mozilla|psf|python software|cnri|hpnd|zlib"
    r"|unlicense|\bzero|\bcc0|matplotlib",
    re.IGNORECASE,
)


def licence(package: Distribution) -> str:
    """The SPDX expression, else the classifiers, else the first line of the free text."""
    said = package.metadata
    classifiers = [c for c in said.get_all("Classifier") or [] if c.startswith("License ::")]
    names = [c.rpartition(":: ")[2] for c in classifiers if not c.endswith("OSI Approved")]
    text = said.get("License-Expression") or ", ".join(names) or said.get("License") or ""
    return text.strip().partition("\n")[0][:80]


def brought_along(root: str = "adarank-fast") -> dict[str, Distribution]:
    """Every package that `root` needs on this platform, by name; `root` itself left out."""
    found: dict[str, Distribution] = {}
    wanted = [root]
    while wanted:
        for text in distribution(wanted.pop()).requires or []:
            need = Requirement(text)
            name = need.name.lower().replace("_", "-")
            if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue  # such as NVIDIA's libraries beside a torch for CPUs
            wanted.append(name)
    return dict(sorted(found.items()))


def main() -> None:
    doubtful = []
    for name, package in brought_along().items():
        text = licence(package)
        print(f"{name} {package.version}: {text or 'says nothing'}")
        if not PERMISSIVE.search(text) or re.search(r"\b[AL]?GPL", text):
            doubtful.append(name)
    if doubtful:
        sys.exit(f"look at the licences of {', '.join(doubtful)}")


if __name__ == "__main__":
    main()
