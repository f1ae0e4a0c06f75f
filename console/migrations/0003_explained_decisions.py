"""A decision column holds a whole explanation; rows of before keep their records in one."""

from django.db import migrations, models

LATER = {"bound": "", "cause": "submitted", "retry_after_s": None}
LATER_OF_CANDIDATE = {"ttft_s_p99": None, "itl_added_s": None, "hit_blocks": None}


def explained(row):
    records = [
        {
            **LATER,
            "after_s": record["waited_s"],
            **record,
            "candidates": [{**LATER_OF_CANDIDATE, **item} for item in record["candidates"]],
        }
        for record in row.decision
    ]
    if not records:
        return {}
    return {
        "request_id": row.request_id,
        "tenant_id": row.tenant_id,
        "model_id": row.model_id,
        "class_name": row.class_name,
        "prompt_tokens": row.prompt_tokens,
        "output_tokens_max": row.output_tokens,
        "ttft_s_target": None,
        "itl_s_target": None,
        "records": records,
        "records_left_out": 0,
        "transfers": [],
        "outcome": None,
        "counterfactuals": [],
    }


def to_explanations(apps, schema_editor):
    requests = apps.get_model("console", "RequestRecord").objects
    for row in requests.iterator(chunk_size=1000):
        if isinstance(row.decision, list):
            row.decision = explained(row)
            row.save(update_fields=["decision"])


class Migration(migrations.Migration):
    dependencies = [("console", "0002_contracts")]

    operations = [
        migrations.AlterField(
            model_name="requestrecord",
            name="decision",
            field=models.JSONField(default=dict),
        ),
        migrations.RunPython(to_explanations, migrations.RunPython.noop),
    ]
