"""Colors of the page: one table for the style sheet and for all figures.

A figure names a color as `var(--branch-0)`, with two hexadecimal digits of opacity behind it if it
is not opaque; the browser resolves it for the theme that is on, and `resolved` for places that have
no style sheet.
"""

from typing import Any

COLORS: dict[str, tuple[str, str]] = {
    "paper": ("#fbfaf8", "#14171a"),
    "raised": ("#ffffff", "#1c2024"),
    "sunk": ("#f1efeb", "#23282d"),
    "line": ("#e2dfd8", "#31373d"),
    "ink": ("#1e2227", "#e8e6e1"),
    "soft": ("#565d66", "#a9afb6"),
    "faint": ("#646b75", "#969da5"),
    "accent": ("#0b6e75", "#5cc4c6"),
    "accent-ink": ("#ffffff", "#0d1a1b"),
    "warn-back": ("#fdf3dc", "#3a2e12"),
    "warn-ink": ("#6d4a00", "#f0d79a"),
    "pale": ("#b5afa4", "#6a7077"),
    "glow": ("#c96f00", "#e8a34d"),
    "branch-0": ("#2a8f86", "#46b5aa"),
    "branch-1": ("#d98c2b", "#e8a34d"),
    "branch-2": ("#5a6fd0", "#8595e8"),
    "branch-3": ("#c65b7c", "#e07f9d"),
    "branch-4": ("#7d9a2e", "#a3c04f"),
    "branch-5": ("#8d62b8", "#b08bd8"),
    "branch-6": ("#3b8fc4", "#62b1e0"),
    "branch-7": ("#9c7448", "#c49a6c"),
    "branch-8": ("#5d6673", "#a7b1c0"),
    "branch-9": ("#b5402c", "#e5806b"),
    "branch-10": ("#1d6b45", "#72c79b"),
    "branch-11": ("#a18d10", "#d8c552"),
}
"""Name of a color -> its value in the light and in the dark theme."""
N_BRANCHES = sum(name.startswith("branch-") for name in COLORS)
"""Number of colors for branches and other categories; further ones start again."""


def category(number: int) -> str:
    """Color of a branch or another category."""
    return f"var(--branch-{number % N_BRANCHES})"


def style_sheet() -> str:
    """CSS variables of both themes."""
    light, dark = (
        " ".join(f"--{name}: {pair[theme]};" for name, pair in COLORS.items()) for theme in (0, 1)
    )
    classes = " ".join(f".c{k} {{ --c: {category(k)}; }}" for k in range(N_BRANCHES))
    return (
        f":root {{ color-scheme: light dark; --categories: {N_BRANCHES}; {light} }}\n{classes}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ color-scheme: light; {light} }} }}"
    )


def resolved(figure: Any, *, dark: bool = False) -> Any:
    """Copy of a figure with the colors of a theme in place of their names."""
    if isinstance(figure, dict):
        return {key: resolved(value, dark=dark) for key, value in figure.items()}
    if isinstance(figure, list):
        return [resolved(value, dark=dark) for value in figure]
    if isinstance(figure, str) and figure.startswith("var(--"):
        name, _, alpha = figure[6:].partition(")")
        return COLORS[name][dark] + alpha
    return figure
