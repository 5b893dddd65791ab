"""Figures of what ``evaluation.analysis`` and ``evaluation.geometry`` find; the numbers as CSV beside each PNG."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pefusion_jax.evaluation.analysis import Disentanglement, LossPlane, table
from pefusion_jax.evaluation.geometry import LayerNorms, Pairwise
from pefusion_jax.evaluation.plots import COLOURS, MARKERS, save_figure

_MINUS = "\N{MINUS SIGN}"
_NUMBER = re.compile(r"(?:^|(?<=/))[0-9]+(?=/|$)")
_MOST_LINES = 2 * len(COLOURS)


def plot_disentanglement(
    errors: Disentanglement | Mapping[str, Disentanglement], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draws disentanglement errors as heat maps from 0 to 2, the square of usual coefficients framed.

    Args:
      errors: from ``disentanglement_error``; or, for one panel each, name of the model -> error, all of the same pair.
      path: of the PNG; a CSV of the same name is written beside it.
      title: shown above all panels.

    Raises:
      ValueError: if there is nothing to draw, or panels are of different tasks.
    """
    panels = {"": errors} if isinstance(errors, Disentanglement) else dict(errors)
    if not panels:
        raise ValueError("there is no disentanglement error to draw")
    pairs = {panel.names for panel in panels.values()}
    if len(pairs) > 1:
        raise ValueError(
            f"the panels are of different tasks: {', '.join(map(str, sorted(pairs)))}; draw a figure for each pair"
        )
    first, second = next(iter(pairs))
    figure, axes = _grid(1, len(panels), 2.75 * len(panels) + 0.75, 2.95 + 0.25 * bool(title))
    image: Any = None
    for place, (name, panel) in enumerate(panels.items()):
        here, edges = axes[0][place], _edges(panel.alphas)
        image = here.pcolormesh(edges, edges, panel.error.T, cmap="viridis_r", vmin=0.0, vmax=2.0, rasterized=True)
        here.add_patch(_box(0.0, 0.0, 1.0, "white", 3.2))
        here.add_patch(_box(0.0, 0.0, 1.0, COLOURS[5], 1.6))
        inside = panel.inside
        note = "" if np.isnan(inside) else f"mean in the frame {inside:.3f}"
        here.set_title("\n".join(filter(None, (name, note))), fontsize=8)
        here.set_aspect("equal")
        here.set_xlabel(f"coefficient of {first}", fontsize=8)
        if place == 0:
            here.set_ylabel(f"coefficient of {second}", fontsize=8)
        here.tick_params(labelsize=7)
    bar = figure.colorbar(image, ax=axes[0].tolist(), shrink=0.85, ticks=[0.0, 0.5, 1.0, 1.5, 2.0])
    bar.set_label("disentanglement error ξ", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=9)
    if len(panels) == 1 and "" in panels:
        save_figure(figure, path, panels[""].csv())
        return
    rows = [
        [name, a, b, panel.error[i, j], *panel.by_task[:, i, j]]
        for name, panel in panels.items()
        for i, a in enumerate(panel.alphas)
        for j, b in enumerate(panel.alphas)
    ]
    header = ["model", f"alpha {first}", f"alpha {second}", "error", f"part of {first}", f"part of {second}"]
    save_figure(figure, path, table(header, rows))


def plot_loss_plane(
    plane: LossPlane,
    path: str | os.PathLike[str],
    *,
    what: Literal["loss", "score"] = "loss",
    task: str | None = None,
    title: str = "",
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draws a loss plane with contours; marked are the base model, the two tuned ones, their average, and the best point.

    Args:
      plane: from ``loss_plane``.
      path: of the PNG; a CSV of all tasks' values of the same name is written beside it.
      what: ``"loss"`` or ``"score"``.
      task: one task, or ``None`` for the mean over tasks.
      title: shown above; by default says what is drawn.
      marks: name -> coefficients of further models to mark.

    Raises:
      ValueError: for another ``what``, or a task that the plane has not.
    """
    values = plane.surface(what, task)
    first, second = plane.names
    x = plane.coefficients
    # Few points far outside would take all colours for themselves: levels follow the ranks of the values.
    low, high = float(values.min()), float(values.max())
    spread = np.quantile(values, np.linspace(0, 1, 13)) if what == "loss" else np.linspace(low, high, 11)
    levels = np.unique(np.concatenate([[low], spread, [high]]))
    flat = high - low <= 1e-12 * max(1.0, abs(low))

    figure, grid = _grid(1, 1, 4.7, 3.7)
    axes = grid[0][0]
    cmap = "Blues_r" if what == "loss" else "Blues"
    if flat or len(levels) < 3:
        drawn = axes.pcolormesh(_edges(x), _edges(x), values.T, cmap=cmap)
    else:
        drawn = axes.contourf(x, x, values.T, levels=levels, cmap=cmap)
        axes.contour(x, x, values.T, levels=levels[1:-1], colors="#333333", linewidths=0.4, alpha=0.6)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, format="%.3g")
    bar.set_label({"loss": "loss", "score": "score"}[what], fontsize=8)
    bar.ax.tick_params(labelsize=7)

    best = np.unravel_index(np.argmin(values) if what == "loss" else np.argmax(values), values.shape)
    models: dict[str, tuple[float, float]] = {
        "base": (0.0, 0.0),
        first: (1.0, 0.0),
        second: (0.0, 1.0),
        "average": (0.5, 0.5),
        **{name: (float(a), float(b)) for name, (a, b) in (marks or {}).items()},
    }
    for colour, width, style in (("white", 1.6, "-"), ("#333333", 0.8, "--")):
        axes.plot([0, 1, 0, 0], [0, 0, 1, 0], color=colour, linewidth=width, linestyle=style, zorder=3)
    for place, (name, (a, b)) in enumerate(models.items()):
        marker, colour = MARKERS[place % len(MARKERS)], COLOURS[1:6][place % 5]
        axes.plot(
            a,
            b,
            marker,
            color=colour,
            markersize=7,
            markeredgecolor="white",
            label=name,
            linestyle="none",
            clip_on=False,
            zorder=5,
        )
    star = f"best on the grid ({values[best]:.3g})"
    axes.plot(
        x[best[0]],
        x[best[1]],
        "*",
        color="black",
        markersize=12,
        markeredgecolor="white",
        label=star,
        linestyle="none",
        zorder=6,
        clip_on=False,
    )
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(x[0], x[-1])
    axes.set_aspect("equal")
    axes.set_xlabel(f"coefficient of {first}", fontsize=8)
    axes.set_ylabel(f"coefficient of {second}", fontsize=8)
    axes.tick_params(labelsize=7)
    whose = f"mean over {len(plane.tasks)} tasks" if task is None and len(plane.tasks) > 1 else (task or plane.tasks[0])
    axes.set_title(title or f"{what.capitalize()}, {whose}", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    save_figure(figure, path, plane.csv())


def plot_layers(
    measured: LayerNorms | Pairwise, path: str | os.PathLike[str], *, title: str = "", label: str | None = None
) -> None:
    """Draws a measure through the layers of a network: a panel for each kind of parameter, a line for each task or pair.

    Parameters whose paths differ in a layer number alone are one kind; layers are counted from 0. Of more than 14 pairs only
    the median and the range are drawn. The random baseline, where there is one, is dashed.

    Args:
      measured: from ``layer_norms``, ``cosine``, ``sign_conflicts`` or ``subspace_overlap``.
      path: of the PNG; a CSV of the same name is written beside it.
      title: shown above all panels.
      label: of the vertical axis.
    """
    if isinstance(measured, LayerNorms):
        lines = {name: measured.by_layer[:, t] for t, name in enumerate(measured.names)}
        chance, label = None, label or "Frobenius norm"
    else:
        lines = {f"{one} · {other}": line for (one, other), line in measured.pairs().items()}
        if not lines:
            raise ValueError("one task alone has no pairs to draw")
        off = ~np.eye(len(measured.names), dtype=bool)
        chance = None if measured.baseline is None else _median(measured.baseline[:, off])
        label = label or measured.measure
    panels = _kinds(measured.layers)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = _grid(rows, columns, 2.9 * columns + 1.5, 2.1 * rows + 0.35 + 0.25 * bool(title), share=True)
    handles: dict[str, Any] = {}
    for panel, (kind, members) in enumerate(panels.items()):
        here = axes[panel // columns][panel % columns]
        x, index = np.asarray([number for number, _ in members]), [place for _, place in members]
        if len(lines) <= _MOST_LINES:
            for t, (name, line) in enumerate(lines.items()):
                (handles[name],) = here.plot(
                    x,
                    line[index],
                    color=COLOURS[t % len(COLOURS)],
                    marker=MARKERS[t % len(MARKERS)],
                    linestyle="-" if t < len(COLOURS) else ":",
                    markersize=3.5,
                    linewidth=1.1,
                )
        else:
            block = np.stack([line[index] for line in lines.values()], axis=1)
            known = ~np.isnan(block).all(axis=1)
            low, high = np.nanmin(block[known], axis=1), np.nanmax(block[known], axis=1)
            handles[f"range of {len(lines)}"] = here.fill_between(
                x[known], low, high, color=COLOURS[4], alpha=0.35, linewidth=0
            )
            (handles["median"],) = here.plot(
                x[known], _median(block[known]), color=COLOURS[0], linewidth=2, marker="o", markersize=3
            )
        if chance is not None:
            (handles["random"],) = here.plot(x, chance[index], color="black", linewidth=1, linestyle="--")
        if len(panels) > 1 or kind:
            here.set_title(_shorten(kind), fontsize=7)
        here.set_xticks(x if len(x) <= 12 else x[:: -(-len(x) // 12)])
        here.set_xlabel("layer" if panel // columns == rows - 1 or panel + columns >= len(panels) else "", fontsize=8)
        here.set_ylabel(label if panel % columns == 0 else "", fontsize=8)
        here.tick_params(labelsize=7, labelbottom=True)
        here.grid(True, linewidth=0.4, alpha=0.5)
        for side in ("top", "right"):
            here.spines[side].set_visible(False)
    for empty in range(len(panels), rows * columns):
        axes[empty // columns][empty % columns].set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7, frameon=False, handlelength=2.2)
    if title:
        figure.suptitle(title, fontsize=9)
    save_figure(figure, path, measured.csv())


def plot_matrix(
    matrix: Any,
    names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    label: str = "",
    rows: str = "",
    columns: str = "",
    centre: float | None = 0.0,
    percent: bool = False,
    good: Literal["high", "low"] = "high",
) -> None:
    """Draws numbers of task pairs, which need not be symmetric, as a heat map; the diagonal stays grey.

    Args:
      matrix: ``[task, task]``; what is not finite stays empty.
      names: of the tasks.
      path: of the PNG; a CSV of the same name is written beside it.
      title: shown above.
      label: of the colour bar.
      rows: what the rows are, such as ``"scored task"``.
      columns: what the columns are.
      centre: value of no colour, from which colours run both ways; ``None``: colours run from the lowest value to the highest.
      percent: write ``100 * value``.
      good: the side of ``centre`` that is blue; the other is red.

    Raises:
      ValueError: if the matrix is not square with a row for each name.
    """
    values = np.asarray(matrix, np.float64)
    if values.shape != (len(names), len(names)) or not len(names):
        raise ValueError(f"a matrix {values.shape} does not fit {len(names)} names; needed is one row and column a name")
    values = 100.0 * values if percent else values
    coloured = np.where(np.eye(len(names), dtype=bool) | ~np.isfinite(values), np.nan, values)
    known = coloured[np.isfinite(coloured)]
    if centre is None:
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        low, high, cmap = low, max(high, low + 1e-9), "Blues"
    else:
        middle = centre * (100.0 if percent else 1.0)
        reach = max(float(np.abs(known - middle).max(initial=0.0)), 5.0 if percent else 0.05)
        low, high, cmap = middle - reach, middle + reach, "RdBu" if good == "high" else "RdBu_r"
    size = 0.5 * len(names) + 0.06 * max(map(len, names)) + 0.9
    figure, grid = _grid(1, 1, size + 1.2, size + 0.1)
    axes = grid[0][0]
    image = axes.imshow(coloured, cmap=cmap, vmin=low, vmax=high)
    axes.set_facecolor("#dddddd")
    for i in range(len(names)):
        for j in range(len(names)):
            if not np.isfinite(values[i, j]):
                continue
            text = f"{values[i, j]:.1f}" if percent else f"{values[i, j]:.2f}"
            text = text.replace("-", "" if float(text) == 0 else _MINUS)
            red, green, blue = image.cmap(image.norm(values[i, j]))[:3] if i != j else (0.87, 0.87, 0.87)
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(columns, fontsize=8)
    axes.set_ylabel(rows, fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if title:
        axes.set_title(title, fontsize=9)
    unscaled = np.asarray(matrix, np.float64)
    save_figure(figure, path, table(["", *names], [[name, *line] for name, line in zip(names, unscaled, strict=True)]))


def _kinds(layers: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Kind of parameter -> (layer number, place in ``layers``); a path's last number counts, a path without one is layer 0."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for place, path in enumerate(layers):
        found = list(_NUMBER.finditer(path))
        kind = path if not found else path[: found[-1].start()] + "*" + path[found[-1].end() :]
        kinds.setdefault(kind, []).append((int(found[-1].group()) if found else 0, place))
    if all(len(members) == 1 for members in kinds.values()) and len(kinds) > 3:
        return {"": [(place, place) for place in range(len(layers))]}  # no layers to tell apart: all in one panel
    return {kind: sorted(members) for kind, members in kinds.items()}


def _shorten(path: str) -> str:
    """The end of a long path."""
    parts = path.split("/")
    while len("/".join(parts)) > 40 and len(parts) > 1:
        parts = parts[1:]
    return ("…/" if len(parts) < len(path.split("/")) else "") + "/".join(parts)


def _median(values: np.ndarray) -> np.ndarray:
    """Median over the second axis of what is known; NaN where nothing is."""
    known = ~np.isnan(values).all(axis=1)
    out = np.full(len(values), np.nan)
    out[known] = np.nanmedian(values[known], axis=1)
    return out


def _edges(points: np.ndarray) -> np.ndarray:
    """Borders of cells around points."""
    if len(points) == 1:
        return np.asarray([points[0] - 0.5, points[0] + 0.5])
    middles = (points[1:] + points[:-1]) / 2
    return np.concatenate([[2 * points[0] - middles[0]], middles, [2 * points[-1] - middles[-1]]])


def _grid(rows: int, columns: int, width: float, height: float, share: bool = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share)


def _box(left: float, bottom: float, size: float, colour: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), size, size, fill=False, edgecolor=colour, linewidth=width)
