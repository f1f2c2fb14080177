"""The picture of a certificate in README.md: `make picture RUN=runs/quickstart` writes docs/certificate.png.

Takes a screenshot of the run's `certificate/certificate.html` up to the end of the checks, with a headless Chromium
(`apt install chromium`), so that the picture is the page a user gets and not a drawing of it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NEXT_SECTION = '<h2 id="cost">'  # the picture ends before it
SIZE = (1100, 2050)  # pixels: verdict, tiles and twenty checks
MAX_BYTES = 300_000


def main(run: str, out: str) -> None:
    """Write `out`, a PNG of the certificate's page of the run directory `run`."""
    page, target = Path(run) / "certificate" / "certificate.html", Path(out).resolve()
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        raise SystemExit("picture: no Chromium found; apt install chromium")
    if not page.is_file():
        raise SystemExit(f"picture: {page}: no such file; run `pldr validate` first, or name a run with RUN=")
    top, found, _ = page.read_text(encoding="utf-8").partition(NEXT_SECTION)
    if not found:
        raise SystemExit(f"picture: {page}: no {NEXT_SECTION}; it was written by another version: validate again")
    with tempfile.TemporaryDirectory(prefix="pldr-picture-") as folder:
        shown, made = Path(folder) / "certificate.html", Path(folder) / "certificate.png"
        shown.write_text(top, encoding="utf-8")
        profile, size = f"--user-data-dir={folder}/profile", f"--window-size={SIZE[0]},{SIZE[1]}"
        command = [browser, *OPTIONS, profile, size, f"--screenshot={made}", shown.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if not made.is_file():
            raise SystemExit(f"picture: {browser} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        if made.stat().st_size > MAX_BYTES:
            raise SystemExit(f"picture: {made.stat().st_size} bytes, at most {MAX_BYTES} are allowed; lower SIZE")
        shutil.copyfile(made, target)
    print(f"{out}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python docs/picture.py RUN_DIR OUT.png")
    main(sys.argv[1], sys.argv[2])
