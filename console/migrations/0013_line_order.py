from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('console', '0012_audit'),
    ]

    operations = [
        migrations.RemoveIndex(
            model_name='batchline',
            name='line_pending',
        ),
        migrations.AddIndex(
            model_name='batchline',
            index=models.Index(fields=['batch', 'status', 'prefix_key', 'id'], name='line_next'),
        ),
    ]
