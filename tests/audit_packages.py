"""pip-audit on constraints.txt: exit 1 where a package has a known vulnerability. Without a network nothing is audited,
and that is said, but does not fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def audit(file: Path = CONSTRAINTS) -> tuple[int, str]:
    """The exit code, and what to say."""
    words = ["--requirement", str(file), "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *words, "--timeout", "15"], capture_output=True, text=True, timeout=600
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return 0, f"pip-audit: nothing was audited, the advisories cannot be reached ({last[:120]})"
    found = [
        f"{one['name']} {one['version']}: {bad['id']} (fixed in {', '.join(bad['fix_versions']) or 'no version'})"
        for one in packages for bad in one.get("vulns", [])
    ]  # fmt: skip
    skipped = sum("skip_reason" in one for one in packages)
    if skipped == len(packages):
        return 0, f"pip-audit: nothing was audited, the index that is reached here knows none of {skipped} packages"
    told = f"pip-audit: {len(packages) - skipped} of {len(packages)} packages audited, {len(found)} vulnerabilities"
    return int(bool(found)), "\n".join([told, *found])


if __name__ == "__main__":
    code, text = audit()
    print(text)
    sys.exit(code)
