"""Candidates: the plans that advice is given about, in the order in which they are preferred without a check.

The order is fixed. It goes by losses on several models and texts, and by what a fold costs (docs/advise.md has figures
of SmolLM2). The text of a plan is what a user types; its size is what the forecast needs, so that no plan need be
parsed. A test holds that the two agree.
"""

from collections.abc import Mapping
from types import MappingProxyType

from kvfold.bench.advise.forecast import PlanSize

FULL = "full"

CANDIDATES: Mapping[str, PlanSize] = MappingProxyType(
    {
        FULL: PlanSize(),
        "int8(rotate=True)": PlanSize(codec="int8"),
        "int4(rotate=True)": PlanSize(codec="int4"),
        "sonic(keep=0.5)": PlanSize(keep=0.5, once=True, scored=True),
        "kvzip(keep=0.5)": PlanSize(keep=0.5, once=True),
        "kvtc(bits=2.4)": PlanSize(bits=2.4),
        "dynakv(rate=0.47)": PlanSize(rate=0.47),
        "dynakv(rate=0.47, int8=True)": PlanSize(rate=0.47, codec="int8"),
        "kvzip(keep=0.5) + int4(rotate=True)": PlanSize(keep=0.5, codec="int4", once=True),
        "dynakv(rate=0.2)": PlanSize(rate=0.2),
        "sonic(keep=0.2)": PlanSize(keep=0.2, once=True, scored=True),
        "kvzip(keep=0.2)": PlanSize(keep=0.2, once=True),
        "sonic(keep=0.2) + int4(rotate=True)": PlanSize(keep=0.2, codec="int4", once=True, scored=True),
        "kvzip(keep=0.2) + int4(rotate=True)": PlanSize(keep=0.2, codec="int4", once=True),
        "snapkv(keep=0.5)": PlanSize(keep=0.5),
        "snapkv(keep=0.2)": PlanSize(keep=0.2),
    }
)
