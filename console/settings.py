"""Django settings, and the only place on the server that reads the environment (console/env.py).

With an empty environment everything works: DEBUG off, SQLite and secrets below `var/`, in-memory
channel layer, loopback hosts only.
"""

import os
import secrets as random_secrets
from pathlib import Path
from typing import Any

from console import env as env_reader
from console import secrets
from controlplane.errors import ConfigError

BASE_DIR = Path(__file__).resolve().parent.parent
ENV = env_reader.read(os.environ, BASE_DIR)
IS_PUBLIC = ENV.profile == "public"

SLACKWATER_VAR = ENV.var
SLACKWATER_TRACES, SLACKWATER_CALIBRATION = ENV.traces, ENV.calibration
STATIC_ROOT = ENV.var / "static"
try:
    STATIC_ROOT.mkdir(parents=True, exist_ok=True)  # WhiteNoise warns when it is absent
except OSError as error:
    raise ConfigError(f"SLACKWATER_VAR={ENV.var}: cannot be written ({error.strerror})") from None

if ENV.secret_key is None or ENV.pepper is None:
    _generated = secrets.load_or_create(ENV.var / "secrets.json")
    SECRET_KEY = ENV.secret_key or _generated["secret_key"]
    _pepper = ENV.pepper or _generated["pepper"]
else:
    SECRET_KEY = ENV.secret_key
    _pepper = ENV.pepper

SLACKWATER_PROFILE = ENV.profile
SLACKWATER_PEPPER = _pepper.encode()  # HMAC key of the stored API keys
SLACKWATER_PLANE_SECRET = secrets.derive(SECRET_KEY, "plane")  # resume secrets, capabilities, salts
GPU_HOUR_USD = ENV.gpu_hour_usd

DEBUG = False
ALLOWED_HOSTS = list(ENV.allowed_hosts)
CSRF_TRUSTED_ORIGINS = list(ENV.csrf_trusted_origins)

INSTALLED_APPS = [
    "console",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_htmx",
    "template_partials",
]

MIDDLEWARE = [
    "console.middleware.SecurityMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "console.middleware.StaticMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "console.middleware.AuditMiddleware",
]

ROOT_URLCONF = "console.urls"
ASGI_APPLICATION = "console.asgi.application"
LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "/"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]


def _database() -> dict[str, Any]:
    """SQLite in `var` tuned for one writer and many readers, or the PostgreSQL of DATABASE_URL.

    Test databases have a name of their own per process, so that test runs do not meet."""
    if ENV.database is not None:
        test_name = f"test_slackwater_{random_secrets.token_hex(6)}"
        return {
            "ENGINE": "django.db.backends.postgresql",
            **ENV.database,
            "CONN_MAX_AGE": 0,
            "TEST": {"NAME": test_name},
        }
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": ENV.var / "slackwater.sqlite3",
        "OPTIONS": {
            # Read-then-write fails with "database is locked" unless transactions begin IMMEDIATE.
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": (
                "PRAGMA journal_mode=WAL;PRAGMA synchronous=NORMAL;PRAGMA cache_size=-65536;"
                "PRAGMA mmap_size=134217728;PRAGMA journal_size_limit=67108864;"
            ),
        },
        "TEST": {"NAME": ENV.var / f"test-{os.getpid()}-{random_secrets.token_hex(4)}.sqlite3"},
    }


DATABASES = {"default": _database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

MEMORY_BROKER = "memory://"
# Side work. Without Redis the broker is this process's memory and `serve` runs the consumer; the
# polling interval is a quarter of what a person notices (one task then takes 20 ms, not a second).
CELERY_BROKER_URL = ENV.redis_url or MEMORY_BROKER
CELERY_BROKER_TRANSPORT_OPTIONS = {"polling_interval": 0.02}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BEAT_SCHEDULE = {"sweep": {"task": "console.tasks.sweep", "schedule": 60.0}}

CHANNEL_LAYERS: dict[str, Any] = {
    "default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}
    if ENV.redis_url is None
    else {
        "BACKEND": "channels_redis.core.RedisChannelLayer",
        "CONFIG": {"hosts": [ENV.redis_url]},
    }
}

STATIC_URL = "/static/"
STATICFILES_FINDERS = [
    "django.contrib.staticfiles.finders.AppDirectoriesFinder",
    "console.staticfinder.PlotlyFinder",
]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "console.staticfinder.StaticStorage"},
}
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False
WHITENOISE_ALLOW_ALL_ORIGINS = False

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "console.auth.OperatorTokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["console.auth.IsOperator"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_VERSIONING_CLASS": "rest_framework.versioning.NamespaceVersioning",
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "console.api.errors.handle",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Slackwater API",
    "DESCRIPTION": "What operators manage: tenants, keys, SLO classes, quotas, models, workers.",
    "VERSION": "1",
    "SERVE_PERMISSIONS": ["console.auth.IsOperator"],
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en-us"
USE_I18N = False

X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_SAMESITE = "Lax"
if IS_PUBLIC:  # TLS ends at the proxy in front of us; health and metrics are asked from inside
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True
    SECURE_SSL_REDIRECT = True
    SECURE_REDIRECT_EXEMPT = [r"^(livez|readyz|healthz|metrics)$"]
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_HSTS_SECONDS = 31_536_000
    SECURE_HSTS_INCLUDE_SUBDOMAINS = True
    SECURE_HSTS_PRELOAD = True

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name} {message}", "style": "{"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "console": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        "django": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
    },
}
