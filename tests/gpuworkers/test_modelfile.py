"""What a worker has learned of its step times survives a restart, and nothing else does."""

import pytest

from controlplane.latency import LatencyModel, StepFeatures
from controlplane.protocol import StepModel
from gpuworkers import modelfile

SEED = StepModel(0.01, 1e-4, 1e-8)
FEATURES = StepFeatures(10, 1000)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLACKWATER_CACHE", str(tmp_path))
    return tmp_path


def learned() -> LatencyModel:
    model = LatencyModel(SEED)
    for _ in range(500):
        model.observe(FEATURES, 0.03)
    return model


def test_a_restarted_worker_predicts_what_it_had_learned(cache):
    path = modelfile.save(learned(), "smollm2", "EPYC fp32 exact")
    assert path.parent == cache / "latency" and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]
    model = LatencyModel(SEED)
    assert modelfile.restore(model, "smollm2", "EPYC fp32 exact")
    assert model.predict_s(FEATURES) == pytest.approx(0.03, rel=0.01)


def test_another_model_or_device_starts_afresh():
    modelfile.save(learned(), "smollm2", "EPYC fp32 exact")
    for model_id, device in (("llama", "EPYC fp32 exact"), ("smollm2", "EPYC bf16 exact")):
        model = LatencyModel(SEED)
        assert not modelfile.restore(model, model_id, device)
        assert model.predict_s(FEATURES) == LatencyModel(SEED).predict_s(FEATURES)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model_id": 3}'])
def test_a_damaged_file_is_as_good_as_none(content):
    path = modelfile.save(learned(), "smollm2", "EPYC fp32 exact")
    path.write_bytes(content)
    assert not modelfile.restore(LatencyModel(SEED), "smollm2", "EPYC fp32 exact")


def test_names_never_leave_the_folder(cache):
    path = modelfile.path_for("../../etc", "/dev/sda")
    assert path.parent == cache / "latency" and len(path.stem) == 16


def test_without_a_cache_folder_the_xdg_cache_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("SLACKWATER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert modelfile.path_for("m", "d").parent == tmp_path / "xdg" / "slackwater" / "latency"
