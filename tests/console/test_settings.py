"""Environment, secrets and the headers that every page carries."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from django.contrib.staticfiles import finders
from django.http import HttpResponse
from django.templatetags.static import static
from django.test import Client, RequestFactory

from console import env, secrets
from console.middleware import CHART_POLICY, POLICY, SecurityMiddleware, chart_page
from controlplane.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s" * 40


def test_an_empty_environment_is_a_local_installation_in_var() -> None:
    read = env.read({}, ROOT)
    assert read == env.Env(
        var=ROOT / "var",
        allowed_hosts=env.LOOPBACK_HOSTS,
        csrf_trusted_origins=(),
        secret_key=None,
        pepper=None,
        database=None,
        redis_url=None,
        gpu_hour_usd=3.0,
        traces="",
        calibration="",
    )
    assert read.profile == "local"


def test_every_setting_is_read() -> None:
    read = env.read(
        {
            "SLACKWATER_VAR": "/srv/sw",
            "ALLOWED_HOSTS": "sw.example.org, localhost",
            "CSRF_TRUSTED_ORIGINS": "https://sw.example.org",
            "SECRET_KEY": SECRET,
            "SLACKWATER_PEPPER": SECRET,
            "DATABASE_URL": "postgresql://me:p%40ss@db:5433/sw",
            "REDIS_URL": "redis://cache:6379/1",
            "GPU_HOUR_USD": "2.25",
        },
        ROOT,
    )
    assert read.profile == "public"
    assert read.var == Path("/srv/sw")
    assert read.database == {
        "NAME": "sw",
        "USER": "me",
        "PASSWORD": "p@ss",
        "HOST": "db",
        "PORT": "5433",
    }
    assert (read.redis_url, read.gpu_hour_usd) == ("redis://cache:6379/1", 2.25)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"SLACKWATER_VRA": "x"}, "SLACKWATER_VRA"),
        ({"GPU_HOUR_USD": "cheap"}, "GPU_HOUR_USD"),
        ({"GPU_HOUR_USD": "-1"}, "GPU_HOUR_USD"),
        ({"GPU_HOUR_USD": "nan"}, "GPU_HOUR_USD"),
        ({"DATABASE_URL": "mysql://x/y"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://host"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://host:port/x"}, "DATABASE_URL"),
        ({"REDIS_URL": "http://x"}, "REDIS_URL"),
        ({"ALLOWED_HOSTS": "*"}, "ALLOWED_HOSTS"),
        ({"ALLOWED_HOSTS": "https://x"}, "ALLOWED_HOSTS"),
        ({"CSRF_TRUSTED_ORIGINS": "x.org"}, "CSRF_TRUSTED_ORIGINS"),
        ({"SECRET_KEY": "short"}, "SECRET_KEY"),
        ({"ALLOWED_HOSTS": "x.org"}, "SECRET_KEY"),
        ({"ALLOWED_HOSTS": "x.org", "SECRET_KEY": SECRET}, "SLACKWATER_PEPPER"),
    ],
)
def test_a_bad_setting_is_refused_by_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        env.read(environ, ROOT)


def test_no_secret_stands_in_the_message_about_it() -> None:
    with pytest.raises(ConfigError) as raised:
        env.read({"SECRET_KEY": "hunter2"}, ROOT)
    assert "hunter2" not in str(raised.value)


def test_secrets_are_made_once_and_readable_by_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "var" / "secrets.json"
    made = secrets.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secrets.load_or_create(path) == made
    assert len(made["secret_key"]) >= 50
    assert made["secret_key"] != made["pepper"]
    assert [entry.name for entry in path.parent.iterdir()] == ["secrets.json"]


def test_processes_that_start_together_agree_on_the_secrets(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    found: list[dict[str, str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(secrets.load_or_create(path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("content", ["", "[]", '{"secret_key": "x"}', '{"secret_key": 1}'])
def test_damaged_secrets_are_not_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secrets.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"secrets\.json"):
        secrets.load_or_create(path)
    assert path.read_text() == content


def test_keys_for_different_purposes_differ() -> None:
    assert secrets.derive(SECRET, "plane") != secrets.derive(SECRET, "other")
    assert len(secrets.derive(SECRET, "plane")) == 32


def manage(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "manage.py", *words],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_checks_are_clean_with_nothing_set(tmp_path: Path) -> None:
    done = manage("check", SLACKWATER_VAR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "no issues (0 silenced)" in done.stdout


@pytest.mark.parametrize("command", [("apikey", "list"), ("plan", "history"), ("verify_audit",)])
def test_a_database_without_tables_is_one_clear_line(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    done = manage(*command, SLACKWATER_VAR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: database: no such table: console_")
    assert done.stderr.endswith(" (tables: `manage.py migrate`)\n")
    assert done.stderr.count("\n") == 1


def test_an_unreachable_database_is_one_line_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/none"
    done = manage("apikey", "list", SLACKWATER_VAR=str(tmp_path), DATABASE_URL=url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: database: ") and done.stderr.count("\n") == 1
    assert "127.0.0.1" in done.stderr and "hunter2" not in done.stderr


def test_the_public_profile_passes_the_deployment_checks(tmp_path: Path) -> None:
    done = manage(
        "check",
        "--deploy",
        "--fail-level=WARNING",
        SLACKWATER_VAR=str(tmp_path),
        ALLOWED_HOSTS="sw.example.org",
        SECRET_KEY="k3" * 30 + "abcdefghij",
        SLACKWATER_PEPPER=SECRET,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "secrets.json").exists()


def test_a_wrong_setting_ends_any_command_with_one_line(tmp_path: Path) -> None:
    done = manage("check", SLACKWATER_VAR=str(tmp_path), GPU_HOUR_USD="x")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: GPU_HOUR_USD='x': expected a price in dollars such as 2.5"
    ]


def test_a_var_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = manage("check", SLACKWATER_VAR=str(tmp_path / "file" / "var"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: SLACKWATER_VAR={tmp_path}/file/var: cannot be written")


def test_pages_carry_a_strict_policy_and_a_request_id(client: Client) -> None:
    response = client.get("/admin/login/", headers={"host": "localhost", "x-request-id": "r-1"})
    assert response.headers["Content-Security-Policy"] == POLICY
    assert response.headers["x-request-id"] == "r-1"
    assert "unsafe" not in POLICY.replace("style-src-attr", "")


def test_a_request_id_that_could_forge_a_header_is_replaced(client: Client) -> None:
    response = client.get("/admin/login/", headers={"host": "localhost", "x-request-id": "a b;c"})
    assert response.headers["x-request-id"].startswith("req-")


def test_only_chart_pages_may_set_style_attributes() -> None:
    request = RequestFactory().get("/")
    charts = SecurityMiddleware(chart_page(lambda request: HttpResponse("x")))(request)
    plain = SecurityMiddleware(lambda request: HttpResponse("x"))(request)
    assert charts.headers["Content-Security-Policy"] == CHART_POLICY
    assert plain.headers["Content-Security-Policy"] == POLICY
    assert "style-src-attr 'unsafe-inline'" in CHART_POLICY
    assert "script-src 'self';" in CHART_POLICY


def test_exactly_one_file_of_plotly_is_published() -> None:
    assert str(finders.find("plotly/plotly.min.js")).endswith("package_data/plotly.min.js")
    assert finders.find("plotly/widgetbundle.js") is None
    plotly = [finder for finder in finders.get_finders() if "Plotly" in type(finder).__name__]
    assert [name for name, _ in plotly[0].list([])] == ["plotly.min.js"]
    assert plotly[0].check() == []


def test_static_names_resolve_before_anything_is_collected(client: Client) -> None:
    for name in ("plotly/plotly.min.js", "admin/css/base.css"):
        assert static(name) == f"/static/{name}"
        response = client.get(static(name), headers={"host": "localhost"})
        assert response.status_code == 200
        assert response.streaming is False
    assert static("absent.css") == "/static/absent.css"
    assert client.get("/static/absent.css", headers={"host": "localhost"}).status_code == 404


def test_static_files_answer_only_reads(client: Client) -> None:
    response = client.post("/static/admin/css/base.css", headers={"host": "localhost"})
    assert response.status_code == 405
    fresh = client.get("/static/admin/css/base.css", headers={"host": "localhost"})
    again = client.get(
        "/static/admin/css/base.css",
        headers={"host": "localhost", "if-none-match": fresh.headers["ETag"]},
    )
    assert (again.status_code, again.content) == (304, b"")


def test_collected_files_have_hashed_names_and_compressed_copies(tmp_path: Path) -> None:
    assert manage("collectstatic", "--noinput", "-v0", SLACKWATER_VAR=str(tmp_path)).returncode == 0
    manifest = json.loads((tmp_path / "static" / "staticfiles.json").read_text())["paths"]
    hashed = manifest["plotly/plotly.min.js"]
    assert hashed != "plotly/plotly.min.js"
    assert (tmp_path / "static" / f"{hashed}.gz").exists()
    assert [path for path in manifest if path.startswith("plotly/")] == ["plotly/plotly.min.js"]
