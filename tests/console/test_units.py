"""Numbers read the same everywhere, and nothing measured never reads as a number."""

import math
from datetime import timedelta

import pytest
from django.template import Context, Template
from django.utils import timezone

from console.templatetags import units

FILTERS = (units.ms, units.ms_of_s, units.rate, units.count, units.usd, units.percent, units.size)


@pytest.mark.parametrize("show", [*FILTERS, units.age])
@pytest.mark.parametrize("value", [None, "", math.nan, math.inf, -math.inf, True])
def test_nothing_measured_reads_no_data(show, value):
    assert show(value) == "no data"


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.ms, 0, "0 ms"),
        (units.ms, 0.42, "0.4 ms"),
        (units.ms, 9.94, "9.9 ms"),
        (units.ms, 10, "10 ms"),
        (units.ms, 999.4, "999 ms"),
        (units.ms, 1000, "1.00 s"),
        (units.ms, 12_340, "12.3 s"),
        (units.ms_of_s, 0.182, "182 ms"),
        (units.rate, 0, "0"),
        (units.rate, 4.24, "4.2"),
        (units.rate, 1820, "1,820"),
        (units.rate, 12_340, "12.3k"),
        (units.count, 12_345, "12,345"),
        (units.usd, 0, "$0"),
        (units.usd, 12.4, "$12.40"),
        (units.usd, 0.128, "$0.128"),
        (units.usd, 0.0031, "$0.0031"),
        (units.percent, 0, "0 %"),
        (units.percent, 0.987, "98.7 %"),
        (units.percent, 1, "100 %"),
        (units.share, 0.5, "50.0%"),
        (units.share, 1.7, "100.0%"),
        (units.share, -1, "0.0%"),
        (units.share, None, "0.0%"),
        (units.size, 512, "512 B"),
        (units.size, 5 << 20, "5.0 MiB"),
        (units.size, 3 << 30, "3.0 GiB"),
        (units.age, 3.2, "3 s"),
        (units.age, 240, "4 min"),
        (units.age, 7200, "2 h"),
        (units.age, 259_200, "3 d"),
        (units.dash, "no data", "–"),
        (units.dash, "4 ms", "4 ms"),
    ],
)
def test_a_number_reads_as_operators_expect(show, value, text):
    assert show(value) == text


def test_the_age_of_a_stored_time_counts_from_now():
    assert units.ago(timezone.now() - timedelta(hours=3)) == "3 h"
    assert units.ago(None) == "no data"


@pytest.mark.parametrize(("part", "whole", "ratio"), [(3, 4, 0.75), (3, 0, None), (None, 4, None)])
def test_a_share_of_nothing_is_unknown(part, whole, ratio):
    assert units.ratio(part, whole) == ratio


@pytest.mark.parametrize("value", sorted(units.STATUS_WORDS))
def test_a_status_is_colour_icon_and_word(value):
    text = Template("{% load units %}{% status value 'a/b' %}").render(Context({"value": value}))
    icon, word = units.STATUS_WORDS[value]
    assert f"is-{icon}" in text and f'href="#i-{icon}"' in text and f">{word}<" in text
    assert 'data-live-status="a/b"' in text


def test_an_unforeseen_status_is_said_to_be_unknown():
    text = Template("{% load units %}{% status 'odd' %}").render(Context())
    assert ">unknown<" in text and "data-live-status" not in text


@pytest.mark.parametrize("icon", sorted({icon for icon, _ in units.STATUS_WORDS.values()}))
def test_every_status_icon_exists(icon):
    assert f'id="i-{icon}"' in Template("{% include 'console/_icons.html' %}").render(Context())
