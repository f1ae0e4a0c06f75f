"""The audit chain: one row for each write of an operator, which nobody can change afterwards."""

import hashlib
import json

from django.db import models

GENESIS = "0" * 64  # stands for the hash before the first event


class AuditEvent(models.Model):
    """Who wrote what and when. `digest` covers the row and the digest before it; the database
    refuses UPDATE and DELETE (migration 0012). `before` and `after` are JSON as text, so that every
    database keeps the very bytes that were hashed."""

    sequence = models.PositiveBigIntegerField(unique=True)
    at = models.DateTimeField(db_index=True)
    actor = models.CharField(max_length=150)
    action = models.CharField(max_length=8)  # create | change | delete
    object_type = models.CharField(max_length=64)
    object_id = models.CharField(max_length=200)
    object_text = models.CharField(max_length=200)
    words = models.TextField()
    before = models.TextField(default="{}")
    after = models.TextField(default="{}")
    log_entry_id = models.BigIntegerField(null=True, unique=True)  # the admin's entry of the write
    previous = models.CharField(max_length=64, unique=True)
    digest = models.CharField(max_length=64, unique=True)

    class Meta:
        ordering = ["-sequence"]

    def __str__(self) -> str:
        return f"{self.sequence} {self.actor} {self.words}"

    def computed(self) -> str:
        """SHA-256 over all columns but the key and the digest itself."""
        names = ("actor", "action", "object_type", "object_id", "object_text", "words")
        parts = [self.sequence, self.at.isoformat(), *(getattr(self, name) for name in names)]
        parts += [self.before, self.after, self.log_entry_id, self.previous]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
