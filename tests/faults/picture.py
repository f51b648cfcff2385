"""Draw the table of tests/README.md that `python -m tests.faults.streams` prints.

Run `python -m tests.faults.picture` when the table has changed.
"""

import re
from html import escape

from tests.support.processes import ROOT

README = ROOT / "tests/README.md"
PICTURE = ROOT / "tests/faults.svg"
COLORS = ("#1a7f37", "#bc4c00", "#0969da", "#8250df")  # ours, then the others
WIDTH, LEFT, SECOND = 860, 270, 50  # pixels: all, to the left of the bars, of a bar
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" \
font-size="12">
<rect width="100%" height="100%" fill="#fafafa"/>
{lines}
</svg>
"""


def table(readme: str) -> list[list[str]]:
    """Return the cells of the table, its head first."""
    rows = re.search(r"^\| fault \| times tried \| lost .*\n(?:\|.*\n)+", readme, re.MULTILINE)
    assert rows
    head, _, *faults = [re.split(r" *\| *", row)[1:-1] for row in rows[0].splitlines()]
    return [head, *faults]


def draw(readme: str) -> str:
    """Return the picture: for each fault a bar for each server, as long as it took to be down."""
    head, *faults = table(readme)
    lines = ['<text x="14" y="26" font-size="14">Seconds until the server was down</text>']
    for i, (server, color) in enumerate(zip(["main.py", *head[4:]], COLORS, strict=True)):
        x = LEFT + (0, 90, 200, 355)[i]
        lines.append(f'<rect x="{x}" y="16" width="10" height="10" fill="{color}"/>')
        lines.append(f'<text x="{x + 15}" y="26">{server}</text>')
    y = 50
    for name, tried, lost, doubled, *others in faults:
        # Who kills a server need not wait for it; and of readers that vanish none is stopped.
        if name.startswith(("kill", "readers")):
            continue
        label = escape(re.sub(r" \(.*\)|`", "", name))
        lines.append(f'<text x="{LEFT - 10}" y="{y + 10}" text-anchor="end">{label}</text>')
        ours = f"{lost} lost, {doubled} doubled; {tried.partition('; ')[2]}"
        for cell, color in zip([ours, *others], COLORS, strict=True):
            counts, _, seconds = cell.partition("; ")
            faulty = [count for count in counts.split(", ") if not count.startswith("0 ")]
            text = ", ".join([seconds, *faulty])
            width = round(float(seconds.removesuffix(" s")) * SECOND)
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{width}" height="11" fill="{color}"/>')
            lines.append(f'<text x="{LEFT + width + 6}" y="{y + 10}">{text}</text>')
            y += 15
        y += 14
    return SVG.format(width=WIDTH, height=y, lines="\n".join(lines))


if __name__ == "__main__":
    PICTURE.write_text(draw(README.read_text()))
