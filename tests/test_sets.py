"""What a run says of its data before it begins."""

from dist_kd.data.order import Order
from dist_kd.sets import rest_warning


def test_a_large_rest_is_a_warning():
    assert rest_warning(Order((500, 500), 100, 0, 1, 1000)) == []
    assert rest_warning(Order((1050, 1), 1000, 0, 1, 1051)) == []  # 51 of 1051: 4.9 %
    (line,) = rest_warning(Order((1500,), 1000, 0, 1, 1500))
    assert line.startswith("WARNING") and "500 of 1,500 samples (33.3 %)" in line and "batch of `1000`" in line
