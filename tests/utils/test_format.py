import pytest

from jepa_scale.utils.format import format_number, text_table


def test_columns_line_up():
    table = text_table(["run", "mrr"], [["a", "0.5"], ["longer", "-"]])
    assert table.splitlines() == ["run     mrr", "------  ---", "a       0.5", "longer    -"]


def test_rows_must_fit_the_header():
    with pytest.raises(ValueError, match="2 columns"):
        text_table(["run", "mrr"], [["a"]])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.99996, "1.000"),
        (0.5, "0.5000"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (999.96, "1000"),
        (1.5e-6, "1.500e-06"),
        (-2.25, "-2.250"),
        (3e12, "3.000e+12"),
    ],
)
def test_numbers(value, shown):
    assert format_number(value) == shown
