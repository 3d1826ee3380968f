"""The place axis so far: one member, which prints as nothing because it is where a cache lies anyway."""

from kvfold.place.device import Device
from kvfold.plan import Plan, members


def test_device_is_the_default_and_leaves_the_text_short():
    assert members("place")["device"] is Device
    assert Plan.parse("device + int8") == Plan.parse("int8")
    assert str(Plan(place=Device())) == "full"
