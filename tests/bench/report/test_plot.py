"""The picture of a table: every curve that is drawn is named, and the names are inside the picture."""

import re

import made

from kvfold.bench.report.plot import LOOKS, as_svg, chosen, figure, score_over_bytes
from kvfold.bench.report.tables import scopes_shown, tables


def test_a_legend_of_many_long_names_is_not_clipped():
    with figure("many", LOOKS["light"]) as (whole, axes):
        for number in range(40):
            axes.plot([0, 1], [0, number], label=f"chunkkv(keep=0.235) + dynakv(rate=0.47, int8=True) {number}")
        text = as_svg(whole, axes)
        legend = whole.legends[0].get_window_extent()
        assert legend.y0 >= 0
        assert legend.x1 <= whole.bbox.x1
        assert legend.y1 <= whole.bbox.y1
    width = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert width is not None
    assert float(width.group(2)) > 40 * 10, "a line of the legend takes ten points at least"


def test_letters_are_large_enough_where_a_picture_is_700_pixels_wide():
    (table,) = tables(made.run())
    text = score_over_bytes(table)
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', text)[1])
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
    assert sizes
    assert min(sizes) * 700 / width >= 13


def test_the_same_picture_has_other_colours_on_a_dark_page():
    (table,) = tables(made.run())
    light, dark = score_over_bytes(table), score_over_bytes(table, page="dark")
    assert LOOKS["light"].curves[0] in light
    assert LOOKS["dark"].curves[0] in dark
    assert re.findall(r">([^<>]+)</text>", light) == re.findall(r">([^<>]+)</text>", dark)


def test_of_many_curves_the_best_are_drawn_and_one_rival():
    ways = [made.record(f"way{good}(keep=0.2)", 0.2, (1.0,) * good + (0.0,) * (20 - good)) for good in range(12, 20)]
    rivals = [
        made.record("a:Low(keep=0.2)", 0.2, (1.0,) * 3 + (0.0,) * 17),
        made.record("a:High(keep=0.2)", 0.2, (1.0,) * 20, stored=1.0),
    ]
    (table,) = tables([made.record("full", None, (1.0,) * 20), *ways, *rivals])
    assert list(chosen(table)) == ["way19", "way18", "way17", "a:Low"]
    assert "The table has 6 others." in score_over_bytes(table)


def test_the_scope_that_is_shown_is_named():
    plans = ["h2o(keep=0.5, scope='turn')", "full", "snapkv(keep=0.5, scope='turn') + int8", "first(scope='history')"]
    assert scopes_shown(plans) == [
        "shown in scope 'history': first()",
        "shown in scope 'turn': h2o(keep=0.5), snapkv(keep=0.5) + int8",
    ]
    assert scopes_shown(["full", "int8"]) == []
