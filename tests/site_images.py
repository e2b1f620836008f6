"""Pictures of HTML pages, taken by Chromium without a display."""

import shutil
import subprocess
from pathlib import Path

WIDTH, HEIGHT = 1000, 900  # pixels
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def picture(page: Path, png: Path) -> Path:
    """Draw the HTML file `page` into `png`, in few colors, which makes it small; returns `png`."""
    from PIL import Image

    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    where = [f"--user-data-dir={png.parent / 'profile'}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={png}"]
    subprocess.run([*command, *where, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(png) as image:
        small = image.convert("RGB").quantize(128)
    small.save(png, optimize=True)
    return png


def check_picture(png: Path) -> None:
    """`png` has the size of a page, and more on it than a blank one."""
    from PIL import Image

    with Image.open(png) as image:
        assert image.size == (WIDTH, HEIGHT)
        colors = image.convert("RGB").getcolors(WIDTH * HEIGHT)
    assert colors and len(colors) > 20, f"{png}: {len(colors or [])} colors, as on a blank page"
    assert max(count for count, _ in colors) < 0.97 * WIDTH * HEIGHT, f"{png}: almost nothing is drawn"
