"""Draw the training curves as a PNG. Knows curves; equal curves give equal bytes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from research_rl.report.training import Curves

__all__ = ["draw", "render"]

_PANELS = (
    ("Reward", "mean reward per rollout", (("reward", "reward", "#3d82d6"),)),
    (
        "Answers and format",
        "share of rollouts",
        (
            ("f1", "F1", "#3d82d6"),
            ("em", "exact match", "#2f9a4c"),
            ("format", "right format", "#d0761b"),
            ("dev_f1", "F1 on dev, greedy", "#cf4a9b"),
        ),
    ),
    ("Searches", "searches per rollout", (("searches", "searches", "#8d6cc4"),)),
    ("Response length", "tokens written by the model", (("tokens", "tokens", "#7d8794"),)),
)

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
_INK, _PAPER = "#dfe5ec", "#1b2129"
_DARK: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK),
    "grid.alpha": 0.12,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), _PAPER),
}

_FEW = 10
"""Values below which a series is drawn without a moving average."""


def draw(curves: Curves, path: Path, title: str) -> None:
    """Write four panels over the training step; a thin line per step, a bold one for the moving average."""
    path.write_bytes(render(curves, title))


def render(curves: Curves, title: str, *, dark: bool = False) -> bytes:
    """Return the panels of `draw` as a PNG, `dark` for a dark page."""
    import matplotlib

    # Tasks run in threads and on machines without a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    image = BytesIO()
    with pyplot.rc_context({**_STYLE, **(_DARK if dark else {})}):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
        for axis, panel in zip(axes.flat, _PANELS, strict=True):
            _panel(axis, curves, *panel)
        for axis in axes[1]:
            axis.set_xlabel("training step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(title)
        figure.tight_layout()
        # The name and version of matplotlib would make equal curves differ in their bytes.
        figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return image.getvalue()


def _panel(axis: Any, curves: Curves, title: str, label: str, lines: tuple[tuple[str, str, str], ...]) -> None:
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set_ylabel(label)
    drawn = [line for line in lines if line[0] in curves.series]
    for name, text, colour in drawn:
        steps, values = curves.series[name]
        axis.plot(steps, values, color=colour, alpha=0.35, linewidth=1, marker="o", markersize=2.5)
        axis.plot(steps, _smooth(values), color=colour, linewidth=2.2, label=text)
    if not drawn:
        axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes, color="#888888")
    if len(drawn) > 1:
        axis.legend(frameon=False, loc="best")
    low, high = axis.get_ylim()
    # From zero, so that noise does not look like progress.
    axis.set_ylim(min(0.0, low), high + 0.05 * (high - min(0.0, low)))


def _smooth(values: list[float]) -> list[float]:
    """Return the centred moving average over a tenth of the run, narrower at both ends; a few values far apart stay as they are."""
    half = max(1, len(values) // 20) if len(values) >= _FEW else 0
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]
