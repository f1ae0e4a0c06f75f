"""The audit chain, and triggers that refuse to change or delete its rows.

A later migration that makes SQLite build the table anew has to make the triggers again.
"""

from django.db import migrations, models

SQLITE = (
    "CREATE TRIGGER auditevent_no_update BEFORE UPDATE ON console_auditevent"
    " BEGIN SELECT RAISE(ABORT, 'audit events are append-only'); END",
    "CREATE TRIGGER auditevent_no_delete BEFORE DELETE ON console_auditevent"
    " BEGIN SELECT RAISE(ABORT, 'audit events are append-only'); END",
)
POSTGRESQL = (
    "CREATE FUNCTION console_auditevent_refuse() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN RAISE EXCEPTION 'audit events are append-only'; END $$",
    "CREATE TRIGGER auditevent_append_only BEFORE UPDATE OR DELETE ON console_auditevent"
    " FOR EACH ROW EXECUTE FUNCTION console_auditevent_refuse()",
)
UNDO = {
    "sqlite": (
        "DROP TRIGGER auditevent_no_update",
        "DROP TRIGGER auditevent_no_delete",
    ),
    "postgresql": (
        "DROP TRIGGER auditevent_append_only ON console_auditevent",
        "DROP FUNCTION console_auditevent_refuse()",
    ),
}
DO = {"sqlite": SQLITE, "postgresql": POSTGRESQL}


def make(apps, schema_editor):
    for statement in DO[schema_editor.connection.vendor]:
        schema_editor.execute(statement)


def unmake(apps, schema_editor):
    for statement in UNDO[schema_editor.connection.vendor]:
        schema_editor.execute(statement)


class Migration(migrations.Migration):
    dependencies = [("console", "0011_alerts")]

    operations = [
        migrations.CreateModel(
            name="AuditEvent",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("sequence", models.PositiveBigIntegerField(unique=True)),
                ("at", models.DateTimeField(db_index=True)),
                ("actor", models.CharField(max_length=150)),
                ("action", models.CharField(max_length=8)),
                ("object_type", models.CharField(max_length=64)),
                ("object_id", models.CharField(max_length=200)),
                ("object_text", models.CharField(max_length=200)),
                ("words", models.TextField()),
                ("before", models.TextField(default="{}")),
                ("after", models.TextField(default="{}")),
                ("log_entry_id", models.BigIntegerField(null=True, unique=True)),
                ("previous", models.CharField(max_length=64, unique=True)),
                ("digest", models.CharField(max_length=64, unique=True)),
            ],
            options={"ordering": ["-sequence"]},
        ),
        migrations.RunPython(make, unmake),
    ]
