"""`bench coserve` and `latency` as commands: one JSON object on stdout, a reason when they fail."""

import io
import json

import pytest
from django.core.management import CommandError, call_command

from console.simprocess import SimFailed, simulate
from controlplane.latency import LatencyModel, StepFeatures
from controlplane.protocol import StepModel

STEP = StepModel(0.01, 1e-4, 1e-8)


def run(*arguments: str) -> str:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def test_bench_coserve_prints_exactly_one_json_object():
    out = run("bench", "coserve", "--json", "--seeds", "1", "--seconds", "40")
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert {"harvest", "ttft_p99_inflation", "itl_miss", "batch_vs_tuned_chunk"} <= set(answer)
    assert answer["seeds"] == 1 and len(answer["targets"]) == 2


def test_bench_plane_without_traces_says_in_one_line_how_to_give_them(settings):
    settings.SLACKWATER_TRACES = ""
    out = io.StringIO()
    with pytest.raises(SystemExit):
        call_command("bench", "plane", "--part", "overload", traces="", stdout=out)
    assert "SLACKWATER_TRACES" in json.loads(out.getvalue())["error"]


def test_bench_router_times_decisions_with_and_without_a_large_cluster():
    out = run("bench", "router", "--json", "--blocks", "6400", "--repeats", "1")
    answer = json.loads(out)
    assert out.count("\n") == 1
    figures = {"decision_us_p50_100", "decision_us_p99_100", "scale_1000_vs_100"}
    assert figures | {"index_bytes_per_block"} <= set(answer)
    assert answer["placed_share"] > 0.99 and answer["index_bytes_per_block"] < 200
    assert "placed_share" in run("bench", "router", "--blocks", "6400", "--repeats", "1")


def test_a_failed_simulation_is_an_error_object_and_exit_code_1(capfd):
    out = io.StringIO()
    with pytest.raises(SystemExit) as stopped:
        call_command("bench", "coserve", "--json", "--seeds", "0", stdout=out)
    assert stopped.value.code == 1
    assert set(json.loads(out.getvalue())) == {"error"}
    assert "Error" in capfd.readouterr().err


def test_the_simulators_own_complaint_reaches_stderr(capfd):
    with pytest.raises(SimFailed, match="ended with 2"):
        simulate(["coserve", "--no-such-option"])
    assert "no-such-option" in capfd.readouterr().err


def test_bench_kernels_says_in_one_line_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("bench", "kernels").splitlines() == [
        "bench kernels: no NVIDIA GPU on this machine, nothing was measured"
    ]
    out = io.StringIO()
    with pytest.raises(SystemExit) as stopped:
        call_command("bench", "kernels", "--json", stdout=out)
    assert stopped.value.code == 1 and out.getvalue().count("\n") == 1
    assert "no NVIDIA GPU" in json.loads(out.getvalue())["error"]


def test_latency_prints_what_a_saved_model_has_gathered(tmp_path):
    model = LatencyModel(STEP)
    features = StepFeatures(10, 1000)
    for _ in range(500):
        model.observe(features, model.predict_s(features))
    path = tmp_path / "model.json"
    path.write_bytes(model.save("llama", "H200 bf16", "2"))
    export = tmp_path / "coefficients.json"
    answer = json.loads(run("latency", "--saved", str(path), "--export", str(export), "--json"))
    assert answer["model_id"] == "llama" and answer["steps"] == 500
    assert answer["coverage"] == 1.0 and answer["mape"] == pytest.approx(0.0, abs=1e-9)
    assert list(answer["buckets"]) == ["decode"]
    assert json.loads(export.read_text()) == answer["coefficients"]
    table = run("latency", "--saved", str(path))
    assert "over_prediction" in table and "decode" in table and "base_s" in table


@pytest.mark.parametrize(("content", "reason"), [(b"{}", "not a saved"), (None, "No such file")])
def test_a_file_that_is_no_saved_model_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=reason):
        run("latency", "--saved", str(path))


@pytest.mark.parametrize("arguments", [("engine",), ("coserve", "--engine", "cpu")])
def test_a_folder_that_is_no_model_is_an_error_object(tmp_path, arguments):
    out = io.StringIO()
    with pytest.raises(SystemExit) as stopped:
        call_command("bench", *arguments, "--json", "--model", str(tmp_path), stdout=out)
    assert stopped.value.code == 1 and out.getvalue().count("\n") == 1
    assert "config.json" in json.loads(out.getvalue())["error"]
