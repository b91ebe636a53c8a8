"""A dashboard as W&B's own: a workspace, which lives with the project, and a report, which can be shared.

Nothing here talks to W&B but `save`.
"""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from denoiselab.reports.dashboard import Board, Panel, Section
from denoiselab.training.wandb_history import STEP
from denoiselab.training.wandb_identity import SWEEP_KEY

ABOUT = "Made by denoiselab-dashboard; the same command makes it anew."
WIDE, NARROW, HEIGHT = 12, 8, 7  # of a report's 24 columns


def workspace(board: Board, entity: str, project: str) -> ws.Workspace:
    """A workspace: a section of panels after the other, of the runs of a sweep, of those that were named, or of all."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=board.title,
        sections=[_section(section) for section in board.sections],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(filters=_filters(board), order=[ws.Ordering(ws.Metric("Name"))]),
    )


def report(board: Board, entity: str, project: str) -> wr.Report:
    """A report: the same panels under headings."""
    blocks: list[Any] = [wr.TableOfContents()]
    for section in board.sections:
        # Without a project it is the report's; naming it would have the library ask W&B for its number.
        runs = wr.Runset(name=board.sweep or "runs", filters=_filters(board))
        blocks += [wr.H2(text=section.name), wr.PanelGrid(runsets=[runs], panels=_laid_out(section))]
    return wr.Report(
        entity=entity, project=project, title=board.title[:128], description=ABOUT, width="fluid", blocks=blocks
    )


def spec_of(made: ws.Workspace | wr.Report) -> dict[str, Any]:
    """What W&B is sent of a workspace or report."""
    return made._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def save(made: ws.Workspace | wr.Report, known: dict[str, str]) -> dict[str, str]:
    """Save a workspace or report at W&B, over the one that was saved before.

    Args:
        made: to save.
        known: what was returned for that one; empty: there was none.

    Returns:
        Its URL, and what W&B knows it by.
    """
    if isinstance(made, ws.Workspace):
        if known:
            made._internal_id, made._internal_name = known["id"], known["name"]
        made.save()
        return {"url": made.url, "id": made._internal_id, "name": made._internal_name}
    if known:
        made.id = known["id"]
    made.save()
    return {"url": made.url, "id": made.id, "name": made.title}


def _filters(board: Board) -> Any:
    """The runs of the sweep, or those that were named."""
    if board.sweep is not None:  # W&B keeps each entry of a config below "value", and its own filters say so
        return expr.And(expr.Config(f"{SWEEP_KEY}.value") == board.sweep)
    return "" if board.ids is None else expr.And(expr.Metric("ID").isin(list(board.ids)))


def _section(section: Section) -> ws.Section:
    return ws.Section(name=section.name, panels=[_panel(panel) for panel in section.panels], is_open=True)


def _laid_out(section: Section) -> list[Any]:
    """Panels side by side: two a row, or three if there are many."""
    width = NARROW if len(section.panels) > 2 else WIDE
    across = 24 // width
    panels = [_panel(panel) for panel in section.panels]
    for place, panel in enumerate(panels):
        panel.layout = wr.Layout(x=place % across * width, y=place // across * HEIGHT, w=width, h=HEIGHT)
    return panels


def _panel(panel: Panel) -> Any:
    """W&B's panel of one of ours."""
    if panel.kind == "lines":
        return wr.LinePlot(
            title=panel.title,
            x=panel.x,
            y=list(panel.keys),
            log_x=panel.log_x or None,
            log_y=panel.log_y or None,
            max_runs_to_show=100,
        )
    if panel.kind == "pictures":
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), mode="gallery", gallery_axis="step")
    if panel.kind == "differences":
        return wr.RunComparer(diff_only="split")
    metric = wr.SummaryMetric(panel.keys[0])
    if panel.kind == "scatter":
        return wr.ScatterPlot(title=panel.title, x=wr.Config(panel.x), y=metric, log_x=panel.log_x or None)
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=[panel.keys[0]], max_bars_to_show=100)
    if panel.kind == "importance":
        return wr.ParameterImportancePlot(with_respect_to=panel.keys[0])
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in panel.config]
    last = wr.ParallelCoordinatesPlotColumn(metric=metric, inverted=panel.falling or None)
    return wr.ParallelCoordinatesPlot(title=panel.title, columns=[*columns, last])
