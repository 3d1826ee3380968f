"""The picture of a table: every curve is named, and the names are inside the picture."""

import re

import made

from kvfold.bench.report.plot import as_svg, figure, score_over_bytes
from kvfold.bench.report.tables import scopes_shown, tables


def test_a_legend_of_many_long_names_is_not_clipped():
    with figure("many") as (whole, axes):
        for number in range(40):
            axes.plot([0, 1], [0, number], label=f"chunkkv(keep=0.235) + dynakv(rate=0.47, int8=True) {number}")
        text = as_svg(whole, axes)
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= 0
        assert legend.x1 <= whole.bbox.x1
        assert legend.y1 <= whole.bbox.y1
    width = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert width is not None
    assert float(width.group(2)) > 40 * 10, "a line of the legend takes ten points at least"


def test_a_small_table_has_a_picture_of_the_usual_size():
    (table,) = tables(made.run())
    assert 'viewBox="0 0 648' in score_over_bytes(table)


def test_the_scope_that_is_shown_is_named():
    plans = ["h2o(keep=0.5, scope='turn')", "full", "snapkv(keep=0.5, scope='turn') + int8", "first(scope='history')"]
    assert scopes_shown(plans) == [
        "shown in scope 'history': first()",
        "shown in scope 'turn': h2o(keep=0.5), snapkv(keep=0.5) + int8",
    ]
    assert scopes_shown(["full", "int8"]) == []
