"""The demo's parts that need no server: settings, checks, load, rows, report."""

import json
import os
import random
import socket
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth import authenticate
from django.core.management.base import CommandError
from django.utils import timezone

from console import demo, demochecks, demoload, demomeasure, demoreport, demoseed, demostart
from console.auth import verify
from console.batchcheck import Line, parse_line
from console.democlient import Answer, Reader
from console.demoload import Prompts
from console.models import ApiKey, RequestRecord, SLOClassRow, Tenant
from console.snapshot import Snapshot
from console.tokens import ByteTokenizer


class WordTokenizer:
    """A token is a word with the blank before it, as byte-level BPE mostly has it."""

    def __init__(self):
        self.pieces = []

    def encode(self, text):
        ids = []
        for word in text.split(" "):
            self.pieces.append(f" {word}".encode())
            ids.append(len(self.pieces) - 1)
        return ids


@pytest.fixture
def prompts():
    return Prompts(WordTokenizer())


# --- settings ------------------------------------------------------------------------------------


def test_an_empty_environment_is_an_endless_demo_with_load():
    assert demostart.read_options({}) == demostart.DemoOptions(None, None, True, 0)


def test_every_demo_variable_is_read(tmp_path):
    options = demostart.read_options(
        {
            "DEMO_SECONDS": "90",
            "DEMO_JSON": str(tmp_path / "out.json"),
            "DEMO_LOAD": "0",
            "FLEET": "64",
        }
    )
    assert options == demostart.DemoOptions(90.0, tmp_path / "out.json", False, 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DEMO_SECONDS", "soon"),
        ("DEMO_SECONDS", "0"),
        ("DEMO_SECONDS", "-1"),
        ("DEMO_SECONDS", "nan"),
        ("DEMO_SECONDS", "1e12"),
        ("DEMO_LOAD", "yes"),
        ("FLEET", "513"),
        ("DEMO_JSON", "/nowhere/at/all.json"),
    ],
)
def test_a_bad_variable_is_named(key, value):
    with pytest.raises(CommandError, match=key):
        demostart.read_options({key: value})


def test_phases_of_the_start_add_up_to_its_length():
    timer = demostart.PhaseTimer(age_s=2.0)
    timer.end_phase("python", 1.5)
    timer.end_phase("model", 0.5)
    assert timer.total_s() == pytest.approx(2.0)
    assert timer.line() == "first token after 2.0 s: python 1.5 s, model 0.5 s"


# --- checks --------------------------------------------------------------------------------------


def test_a_taken_port_that_was_asked_for_is_an_error_and_another_is_not_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port} is taken: name a free one, PORT="):
            demochecks.choose_port(port)


def test_without_a_wish_the_first_free_port_from_8000_on_is_taken():
    chosen = demochecks.choose_port(None)
    assert demochecks.PORT_FIRST <= chosen <= demochecks.PORT_LAST
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", chosen))
        taken.listen()
        assert demochecks.choose_port(None) != chosen


def test_a_full_disk_is_said_with_what_is_free(tmp_path):
    demochecks.check_disk(tmp_path / "not" / "yet", needed_bytes=1)
    with pytest.raises(CommandError, match="GB free in .*free some disk and run it again"):
        demochecks.check_disk(tmp_path / "not" / "yet", needed_bytes=10**18)


def test_too_little_memory_is_said_and_unknown_memory_is_not(tmp_path):
    demochecks.check_memory(None)
    demochecks.check_memory(demochecks.MEMORY_BYTES_MIN)
    with pytest.raises(CommandError, match="close something and run it again"):
        demochecks.check_memory(demochecks.MEMORY_BYTES_MIN - 1)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:  2000 kB\n")
    assert demochecks.available_memory_bytes(meminfo) == 2_048_000
    assert demochecks.available_memory_bytes(tmp_path / "none") is None


# --- load ----------------------------------------------------------------------------------------


def take(prompts, seconds, rate_per_s=0.9, seed=7):
    taken = []
    for arrival in demoload.arrivals(prompts, rate_per_s, seed):
        if arrival.at_s >= seconds:
            return taken
        taken.append(arrival)
    raise AssertionError("arrivals are endless")


def test_the_load_keeps_its_rate_and_halves_its_prompts(prompts):
    sent = take(prompts, 200)
    assert 170 <= len(sent) <= 190
    assert len(sent) <= 200 * demoload.RATE_PER_S_MAX
    assert abs(sum(arrival.is_long for arrival in sent) - len(sent) / 2) <= 1
    assert all(16 <= arrival.output_tokens_max <= 48 for arrival in sent)
    assert {arrival.service_tier for arrival in sent} == {"priority", "default", "flex"}


def test_prompts_have_the_promised_lengths(prompts):
    for arrival in take(prompts, 200):
        words = len(arrival.user_text.split())
        if arrival.is_long:
            assert 250 <= words <= 580
        else:
            assert words <= demoload.SHORT_TOKENS_MAX - demoload.TEMPLATE_TOKENS_MAX + 2


def test_the_same_seed_sends_the_same_load(prompts):
    assert take(prompts, 50) == take(Prompts(WordTokenizer()), 50)
    assert take(prompts, 50) != take(prompts, 50, seed=8)


def test_the_mix_shifts_later_and_comes_back(prompts):
    assert demoload.SHIFT_AFTER_S > 180
    before, shifted = demoload.SHIFT_AFTER_S - 1, demoload.SHIFT_AFTER_S + 1
    assert demoload.long_share(before) == demoload.LONG_SHARE
    assert demoload.long_share(shifted) == demoload.LONG_SHARE_SHIFTED
    assert demoload.long_share(shifted + demoload.SHIFT_PHASE_S) == demoload.LONG_SHARE
    assert demoload.long_share(shifted + 2 * demoload.SHIFT_PHASE_S) == demoload.LONG_SHARE_SHIFTED


def test_a_rate_above_one_is_a_bug(prompts):
    with pytest.raises(AssertionError, match="at most 1"):
        next(demoload.arrivals(prompts, 1.1, 1))


def test_batch_lines_are_valid_and_short(prompts):
    lines = demoload.batch_lines(prompts, "m", 3, num_lines=20).splitlines()
    parsed = [parse_line(raw, number, frozenset({"m"})) for number, raw in enumerate(lines, 1)]
    assert all(isinstance(line, Line) for line in parsed)
    assert len({line.custom_id for line in parsed}) == 20
    assert {line.body["max_tokens"] for line in parsed} == {demoload.BATCH_OUTPUT_TOKENS}


def test_texts_are_cut_between_characters():
    text = Prompts(ByteTokenizer()).text(300, random.Random(1))
    assert len(text.encode()) == 300
    assert text.rsplit("\n", 1)[1] in demoload.QUESTIONS


def test_a_slow_device_gets_a_slower_load():
    fast, slow = demomeasure.Measured(0.2, 0.02), demomeasure.Measured(2.0, 0.2)
    assert demomeasure.load_rate(fast) == demomeasure.load_rate(None) == demomeasure.RATE_PER_S
    assert demomeasure.load_rate(slow) == pytest.approx(0.52 / (0.5 * 2.0 * 428 / 256))
    assert (slow.ttft_s, slow.itl_s) == (8.0, pytest.approx(0.6))


# --- client --------------------------------------------------------------------------------------


def event(text=None, reason=None, **fields):
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice], **fields})}"


def test_the_client_times_tokens_from_the_moment_it_sent():
    reader = Reader(sent_at_s=10.0)
    reader.line(event(""), 10.1)
    reader.line(event("a"), 10.5)
    reader.line(": ping", 10.6)
    reader.line(event("b"), 10.75)
    reader.line(event(reason="stop"), 10.8)
    reader.line(
        'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}', 10.9
    )
    reader.line("data: [DONE]", 10.9)
    assert reader.answer("") == Answer("", "ab", "stop", 0.5, (0.25,), 3, 2)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([event("a")], "the stream ended early"),
        ([event("a", "stop")], "the stream ended early"),
        (['data: {"error": {"message": "it broke"}}', "data: [DONE]"], "it broke"),
    ],
)
def test_a_stream_without_its_end_is_an_error(lines, error):
    reader = Reader(0.0)
    for line in lines:
        reader.line(line, 1.0)
    assert reader.answer("").error == error


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_rows_are_made_once_and_login_and_key_stay(tmp_path):
    first = demoseed.seed(tmp_path, "http://127.0.0.1:8000", tmp_path)
    second = demoseed.seed(tmp_path, "http://127.0.0.1:8001", tmp_path)
    assert (first.password, first.api_key) == (second.password, second.api_key)
    assert second.url == "http://127.0.0.1:8001"
    assert demoseed.read_login(tmp_path) == second
    assert ApiKey.objects.count() == Tenant.objects.count() == 1
    assert authenticate(username="admin", password=first.password).is_superuser
    assert verify(Snapshot.load(), first.api_key).tenant_id == "demo"


@pytest.mark.django_db
def test_a_lost_login_file_gives_a_new_password_and_key(tmp_path):
    first = demoseed.seed(tmp_path, "", tmp_path)
    demoseed.state_path(tmp_path).unlink()
    second = demoseed.seed(tmp_path, "", tmp_path)
    assert second.api_key != first.api_key
    assert authenticate(username="admin", password=first.password) is None
    assert authenticate(username="admin", password=second.password) is not None


@pytest.mark.django_db
def test_a_revoked_key_is_replaced(tmp_path):
    first = demoseed.seed(tmp_path, "", tmp_path)
    ApiKey.objects.update(is_active=False)
    second = demoseed.seed(tmp_path, "", tmp_path)
    assert second.api_key != first.api_key
    assert verify(Snapshot.load(), second.api_key) is not None


@pytest.mark.django_db
def test_login_and_key_are_for_the_owner_only(tmp_path):
    demoseed.seed(tmp_path, "", tmp_path)
    path = demoseed.state_path(tmp_path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


def test_a_foreign_login_file_says_what_to_do(tmp_path):
    demoseed.state_path(tmp_path).write_text("{}")
    with pytest.raises(CommandError, match="run make clean-demo"):
        demoseed.read_login(tmp_path)


@pytest.mark.django_db
def test_classes_are_scaled_only_where_the_device_is_too_slow():
    demoseed.scale_classes(ttft_s=3.0, itl_s=0.15)
    rows = {row.name: row for row in SLOClassRow.objects.all()}
    assert (rows["interactive"].ttft_s_p99, rows["interactive"].itl_s_p99) == (3.0, 0.15)
    assert (rows["standard"].ttft_s_p99, rows["standard"].itl_s_p99) == (3.0, 0.15)
    assert (rows["flex"].ttft_s_p99, rows["flex"].itl_s_p99) == (10.0, 0.2)
    assert rows["interactive"].note == rows["standard"].note == demoseed.SCALED_NOTE
    assert rows["flex"].note == rows["batch"].note == ""
    demoseed.scale_classes(ttft_s=0.1, itl_s=0.01)
    row = SLOClassRow.objects.get(name="interactive")
    assert (row.ttft_s_p99, row.itl_s_p99, row.note) == (0.5, 0.03, "")


# --- report --------------------------------------------------------------------------------------


def record(index, **fields):
    row = {
        "request_id": f"r{index}",
        "tenant_id": "demo",
        "model_id": "m",
        "class_name": "interactive",
        "service_tier": "priority",
        "endpoint": "chat",
        "status": "completed",
        "arrived_at": timezone.now(),
        "output_tokens": 10,
        "split": "local",
        "ttft_ms": float(index),
    }
    return RequestRecord(**{**row, **fields})


@pytest.mark.django_db
def test_the_report_counts_this_run_only():
    since = timezone.now() - timedelta(minutes=1)
    RequestRecord.objects.bulk_create(
        [
            record(1),
            record(2, split="handoff", handoff_bytes=500),
            record(3, is_batch=True, endpoint="batch", output_tokens=16),
            record(4, status="failed", output_tokens=0, split=""),
            record(5, arrived_at=since - timedelta(seconds=1)),
            record(6, is_demo_history=True),
        ]
    )
    report = demoreport.count(since, 1.5, 0)
    assert (report.local, report.handoff, report.handoff_bytes) == (2, 1, 500)
    assert (report.interactive, report.batch_lines, report.failed) == (2, 1, 1)
    assert (report.interactive_tokens, report.batch_tokens) == (20, 16)
    assert report.batch_token_share == pytest.approx(16 / 36)
    assert report.ttft_ms_p99 == 4.0
    assert demoreport.count(since, None, 3).failed == 3


@pytest.mark.django_db
def test_metrics_that_count_otherwise_are_named():
    report = demoreport.count(timezone.now(), None, 0)
    assert demoreport.differences(report, lambda name, labels: 0.0) == []
    found = demoreport.differences(report, lambda name, labels: float("handoff" in name))
    assert found[0].startswith("slackwater_handoff_bytes_total says 1, the request table 0")


@pytest.mark.django_db
def test_the_json_file_has_the_documented_keys(tmp_path):
    path = tmp_path / "out.json"
    demoreport.write_json(path, demoreport.count(timezone.now(), 2.0, 0))
    assert set(json.loads(path.read_text())) >= {
        "handoff",
        "handoff_bytes",
        "handoff_recomputed_tokens",
        "local",
        "interactive",
        "batch_lines",
        "batch_tokens",
        "failed",
        "first_token_s",
        "ttft_ms_p99",
        "itl_ms_p99",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("values", "expected"), [([], None), ([None], None), ([3.0], 3.0), (list(range(1, 101)), 99)]
)
def test_p99_is_the_value_that_99_of_100_do_not_exceed(values, expected):
    assert demoreport.quantile(values, 0.99) == expected


def test_the_banner_has_address_login_key_and_a_command_to_paste():
    login = demoseed.Login("admin", "pw", "demo", "sk-sw-key", "http://127.0.0.1:8003")
    text = "\n".join(demo.banner(login))
    for part in ("http://127.0.0.1:8003/ ", "admin", "pw", "sk-sw-key", "curl", "/v1/chat"):
        assert part in text


def test_the_demo_folder_is_below_the_var_folder():
    assert demostart.FOLDER == "demo"
    assert "DEMO_VAR = $(or $(SLACKWATER_VAR),var)/demo" in Path("Makefile").read_text()
