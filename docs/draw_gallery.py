"""Run the catalogue and keep one figure and the table of each entry for the gallery page.

python docs/draw_gallery.py [NAME ...]: docs/gallery/NAME.png (below 60 kB) and docs/gallery/NAME.txt, all entries by
default. It takes about an hour on two cores; the page shows the command of each entry as it ran here.
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from convexlearn.cli import main
from convexlearn.problems.catalogue import entries

FOLDER = Path(__file__).parent / "gallery"

FIGURES = {
    "admm-recovery": "parameters",
    "box-lqr": "efficiency",
    "generative-prior": "digits",
    "kalman-smoother": "track",
    "linear-tracking": "errors",
    "lista-benchmark": "layers",
    "lorenz-tracking": "trajectory",
    "lqg": "costs",
    "lqr": "costs",
    "markowitz": "wealth",
    "microscopy": "field",
    "mpc-weights": "weights",
    "pendulum-tracking": "film",
    "sparse-recovery": "rho",
    "super-resolution": "reconstructions",
    "supply-chain": "costs",
    "symbol-detection": "errors",
    "ultrasound-clutter": "projections",
    "ultrasound-super-resolution": "vessels",
    "vehicle": "costs",
}
"""Which of an entry's figures stands in the gallery; the first one for entries that are not listed."""

MOST_BYTES = 60_000


def run(name: str, folder: Path) -> str:
    """What the command prints; its figures go to `folder`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["tune", name, "--quiet", "--plot", str(folder)])
    if code:
        raise SystemExit(f"convexlearn tune {name} failed")
    lines = printed.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines if not line.startswith("drew:")) + "\n"


def shrink(source: Path, target: Path) -> None:
    """A palette PNG of at most MOST_BYTES: fewer colours first, then fewer pixels."""
    picture = Image.open(source).convert("RGB")
    width = min(900, picture.width)
    while True:
        small = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        for colours in (128, 64, 32):
            small.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
            if target.stat().st_size < MOST_BYTES:
                return
        width = round(0.85 * width)


def draw(name: str) -> None:
    """Table and figure of one entry."""
    with tempfile.TemporaryDirectory() as folder:
        text = run(name, Path(folder))
        drawn = sorted(Path(folder).glob("*.png"), key=lambda file: file.stat().st_mtime)
        chosen = Path(folder) / f"{FIGURES.get(name, drawn[0].stem)}.png"
        shrink(chosen, FOLDER / f"{name}.png")
    (FOLDER / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for chosen in sys.argv[1:] or list(entries()):
        begin = time.perf_counter()
        draw(chosen)
        sys.stderr.write(f"{chosen}: {time.perf_counter() - begin:.0f} s\n")
