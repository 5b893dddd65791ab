"""Figures for papers: scores, coefficient sweeps, similarities; each with its numbers as CSV beside the PNG.

Matplotlib is imported when a figure is drawn, and only its object interface is used: no window, no global
state.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pefusion_jax.evaluation.report import Comparison
from pefusion_jax.files import write_atomically

# Okabe and Ito's colours, which people with any common colour blindness tell apart; black is kept for means.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 200


def plot_scores(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draws a comparison as a heat map with numbers: methods by tasks, then mean and normalized mean.

    Colours run from each column's lowest to its highest score, so that they compare methods within a task;
    rows of one kind stand together under the kind's name, and the best of a kind in each column is bold.

    Args:
      comparison: the table.
      path: of the PNG; a CSV of the same name is written beside it.
    """
    # Rows may lack a reference, as the zero-shot model does.
    relative = any(row.normalized(comparison.reference) is not None for row in comparison.rows)
    columns = [*comparison.tasks, "mean"] + (["normalized\nmean"] if relative else [])
    blank = [float("nan")] * len(columns)
    kinds = list(dict.fromkeys(row.kind for row in comparison.rows))
    lines: list[tuple[str, str | None, list[float]]] = []  # label, kind (None: a heading), numbers
    for kind in kinds:
        if len(kinds) > 1:
            lines.append((kind, None, blank))
        for row in comparison.rows:
            if row.kind == kind:
                cells = comparison.cells(row)
                chosen = [*cells[: len(comparison.tasks) + 1], *(cells[-2:-1] if relative else [])]
                lines.append((row.name, kind, [float("nan") if v is None else 100.0 * v for v in chosen]))

    values = np.array([line[2] for line in lines])
    known = np.array([kind is not None for _, kind, _ in lines])
    low, high = np.nanmin(values[known], axis=0), np.nanmax(values[known], axis=0)
    shade = (values - low[None, :]) / np.maximum(high - low, 1e-9)[None, :]
    # Tasks and summaries stand apart.
    place = np.arange(len(columns), dtype=np.float64)
    place[len(comparison.tasks) :] += 0.25

    longest = max(len(label) for label, _, _ in lines)
    figure, axes = _figure(0.075 * longest + 0.75 * (place[-1] + 1) + 1.1, 0.27 * len(lines) + 0.95)
    colours = _sequential()
    for y, (name, group, numbers) in enumerate(lines):
        axes.text(-0.62, y, name, ha="right", va="center", fontsize=8, fontweight="normal" if group else "bold")
        for x, number in zip(range(len(columns)), numbers, strict=True):
            if np.isnan(number):
                continue
            colour = colours(0.08 + 0.84 * shade[y, x])
            axes.add_patch(_rectangle(place[x] - 0.5, y - 0.5, colour))
            rivals = [line[2][x] for line in lines if line[1] == group]
            luminance = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]
            axes.text(
                place[x],
                y,
                f"{number:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if luminance > 0.45 else "white",
                fontweight="bold" if len(rivals) > 1 and number == np.nanmax(rivals) else "normal",
            )
    axes.set_xlim(-0.55, place[-1] + 0.55)
    axes.set_ylim(len(lines) - 0.45, -0.55)
    axes.set_xticks(place, columns, fontsize=8)
    axes.set_yticks([])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    if max(len(part) for name in columns for part in name.split("\n")) > 10:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="left", rotation_mode="anchor")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("score × 100; darker is better within a column", fontsize=8)
    if comparison.title:
        axes.set_title(comparison.title, fontsize=9, pad=10)
    save_figure(figure, path, comparison.csv())


def plot_sweep(
    coefficients: Sequence[float] | np.ndarray,
    scores: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    label: str = "scaling coefficient λ",
    score_label: str = "score",
) -> None:
    """Draws scores against a coefficient: a thin line a task, a thick one for the mean, its best marked.

    Args:
      coefficients: ``[point]``, in increasing order.
      scores: task name -> scores ``[point]``; or, for one panel each, method name -> such a mapping.
      path: of the PNG; a CSV of the same name is written beside it.
      label: of the horizontal axis.
      score_label: of the vertical axis, which all panels share.

    Raises:
      ValueError: if there is no task, or a curve has another number of points than there are coefficients.
    """
    x = np.asarray(coefficients, np.float64)
    nested = bool(scores) and all(isinstance(value, Mapping) for value in scores.values())
    panels: dict[str, dict[str, np.ndarray]] = {
        title: {task: np.asarray(curve, np.float64) for task, curve in panel.items()}
        for title, panel in (scores if nested else {"": scores}).items()
    }
    for title, panel in panels.items():
        if not panel:
            raise ValueError(f"there are no scores to draw{f' for {title!r}' if title else ''}")
        for task, curve in panel.items():
            if curve.shape != x.shape:
                raise ValueError(f"{task!r} has scores {curve.shape} for coefficients {x.shape}; they must agree")
    tasks = list(dict.fromkeys(task for panel in panels.values() for task in panel))

    figure, all_axes = _figure(2.6 * len(panels) + 1.5, 2.7, columns=len(panels))
    handles: dict[str, Any] = {}
    for axes, (title, panel) in zip(np.atleast_1d(all_axes), panels.items(), strict=True):
        for t, task in enumerate(tasks):
            if task in panel:
                (handles[task],) = axes.plot(
                    x,
                    panel[task],
                    color=COLOURS[t % len(COLOURS)],
                    marker=MARKERS[t % len(MARKERS)],
                    markersize=3,
                    markevery=max(1, len(x) // 7),
                    linewidth=1,
                    linestyle="-" if t < len(COLOURS) else "--",
                )
        mean = np.mean(list(panel.values()), axis=0)
        (handles["mean"],) = axes.plot(x, mean, color="black", linewidth=2.2)
        best = int(np.argmax(mean))
        axes.axvline(x[best], color="black", linewidth=0.7, linestyle=":")
        (handles["best mean"],) = axes.plot(
            x[best],
            mean[best],
            marker="*",
            color="black",
            markersize=11,
            linestyle="none",
            markeredgecolor="white",
        )
        axes.set_title(f"{title}\n" * bool(title) + f"best mean {mean[best]:.3f} at {x[best]:.3g}", fontsize=8)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(True, linewidth=0.4, alpha=0.5)
        axes.margins(x=0.02)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    np.atleast_1d(all_axes)[0].set_ylabel(score_label, fontsize=8)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right center",
        fontsize=7,
        frameon=False,
        handlelength=2.2,
    )

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["panel", "coefficient", *tasks, "mean"])
    for title, panel in panels.items():
        for p, value in enumerate(x):
            curves = [repr(float(panel[task][p])) if task in panel else "" for task in tasks]
            writer.writerow([title, repr(float(value)), *curves, repr(float(np.mean([c[p] for c in panel.values()])))])
    save_figure(figure, path, out.getvalue())


def plot_curves(
    curves: Mapping[str, Mapping[float, tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    x: str,
    y: str = "score",
    log_x: bool = False,
) -> None:
    """Draws a line for each name, with its spread as a band.

    Args:
      curves: name -> place on the horizontal axis -> (mean, spread).
      path: of the PNG; a CSV of the same name is written beside it.
      x: label of the horizontal axis.
      y: label of the vertical axis.
      log_x: the horizontal axis is logarithmic; each place that occurs gets a tick.

    Raises:
      ValueError: if there is nothing to draw.
    """
    if not curves or not all(curves.values()):
        raise ValueError("there is no curve to draw, or one without a point")
    figure, axes = _figure(6.4, 3.4)
    for c, (name, points) in enumerate(curves.items()):
        places = np.asarray(sorted(points), np.float64)
        mean, spread = np.asarray([points[place] for place in sorted(points)], np.float64).T
        colour = COLOURS[c % len(COLOURS)]
        line = "-" if c < len(COLOURS) else "--"
        axes.plot(places, mean, line, color=colour, marker=MARKERS[c % len(MARKERS)], markersize=4, linewidth=1.3, label=name)
        axes.fill_between(places, mean - spread, mean + spread, color=colour, alpha=0.13, linewidth=0)
    if log_x:
        axes.set_xscale("log")
        ticks = sorted({place for points in curves.values() for place in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right center", fontsize=7, frameon=False, handlelength=2.4)

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["curve", x, "mean", "spread"])
    for name, points in curves.items():
        writer.writerows([name, repr(float(place)), *(repr(float(v)) for v in points[place])] for place in sorted(points))
    save_figure(figure, path, out.getvalue())


def plot_ranking(
    groups: Mapping[str, Mapping[str, tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    x: str = "mean score",
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draws a row for each name with a point and its spread for each group, the best of the first group at the top.

    Args:
      groups: group -> name -> (mean, spread); names may be in some groups only, and those that the first lacks come last.
      path: of the PNG; a CSV of the same name is written beside it.
      x: label of the horizontal axis.
      lines: values to compare with, by name: vertical lines.

    Raises:
      ValueError: if there is nothing to draw, or a group is empty.
    """
    if not groups:
        raise ValueError("there is nothing to rank")
    for group, points in groups.items():
        if not points:
            raise ValueError(f"there is nothing to rank in the group {group!r}; leave it out")
    names = list(dict.fromkeys(name for points in groups.values() for name in points))
    first = next(iter(groups.values()))
    names.sort(key=lambda name: -first[name][0] if name in first else np.inf)
    figure, axes = _figure(6.8, 0.17 * len(names) + 1.0)
    for g, (group, points) in enumerate(groups.items()):
        shift = 0.16 * (g - (len(groups) - 1) / 2)
        found = [(points[name][0], y + shift, points[name][1]) for y, name in enumerate(names) if name in points]
        mean, place, spread = np.asarray(found, np.float64).T
        style = {"color": COLOURS[g % len(COLOURS)], "marker": MARKERS[g % len(MARKERS)]}
        axes.errorbar(mean, place, xerr=spread, linestyle="", markersize=3.5, elinewidth=0.8, label=group, **style)
    for c, (label, value) in enumerate((lines or {}).items()):
        axes.axvline(value, color="0.45", linewidth=0.9, linestyle=("--", ":", "-.")[c % 3], label=label)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "name", "mean", "spread"])
    for group, points in groups.items():
        writer.writerows([group, name, *(repr(float(v)) for v in points[name])] for name in names if name in points)
    save_figure(figure, path, out.getvalue())


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, sharey=True)


def _sequential() -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"]


def _rectangle(left: float, bottom: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), 1, 1, facecolor=colour, edgecolor="white", linewidth=1)


def save_figure(figure: Any, path: str | os.PathLike[str], table: str) -> None:
    """Writes a figure as PNG, and its numbers as CSV beside it."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are PNG files, but the path is {str(path)!r}; end it with .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    write_atomically(path, picture.getvalue())
    write_atomically(path.with_suffix(".csv"), table.encode())
